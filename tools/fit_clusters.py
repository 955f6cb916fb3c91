"""Cluster the instructions of records, for the router `cluster`: write the table that a recipe names as data.clusters.

INPUT is a recipe (a name, or a .yaml file), for the records of its sparse stages, a setting in place of the recipes'
(KEY=VALUE, as for `moe-lvlm train`), or a file of LLaVA records (.json, .jsonl). Each record's first human turn, without image marks, is encoded with a sentence-transformers model; k-means
groups the distinct ones, each counted as often as it occurs. The table holds the centres and the cluster of every
instruction; one that it does not hold goes to the nearest centre, for which the encoder is needed again.
Needs sentence-transformers and scikit-learn: moe-lvlm's extra `clusters`.

Examples:
    python tools/fit_clusters.py ltdr/cluster data.image_root=data --out data/clusters.safetensors
    python tools/fit_clusters.py mix665k.json --assign textvqa.json pope.json --out clusters.safetensors --device cuda
    python tools/fit_clusters.py package:scenes/train.json --clusters 8 --dry-run

Exit status: 0 done, 2 a mistake in the arguments or the data, 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from terminal import DONE, make_parser, run

LARGEST = 5  # clusters whose instructions are shown
SHOWN = 3  # instructions of each
_OVERRIDE = re.compile(r"[a-z_][a-z0-9_.]*=")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="recipes, their settings, files of records")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, a .safetensors file")
    parser.add_argument("--clusters", type=int, default=128, metavar="K")
    parser.add_argument("--stage", metavar="NAME", help="of a recipe, only this stage's records")
    parser.add_argument(
        "--assign", nargs="+", default=[], metavar="RECORDS", help="records, as of evaluation sets, that move no centre"
    )
    parser.add_argument(
        "--encoder", metavar="PATH|NAME", help="a folder or hub name (default: sentence-transformers/all-MiniLM-L6-v2)"
    )
    parser.add_argument("--encoder-name", metavar="NAME", help="the name that the table gives it (default: --encoder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, metavar="N", help="fit the centres on N distinct instructions")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts encoded at once")
    parser.add_argument("--device", help="where the encoder runs (default: a GPU if there is one)")
    parser.add_argument("--dry-run", action="store_true", help="count the instructions and stop; needs no encoder")
    args = parser.parse_args(argv)
    for name in ("clusters", "sample", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value}; allowed: 1 or more")
    if args.seed < 0:
        parser.error(f"--seed: {args.seed}; allowed: 0 or more")
    if args.out.suffix != ".safetensors":
        parser.error(f"--out: {args.out}; allowed: a file that ends in .safetensors")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    return run(lambda: _fit(args))


def _fit(args: argparse.Namespace) -> int:
    from moe_lvlm.data.clustering import fit_clusters  # after --help, which needs none of it
    from moe_lvlm.data.encoder import DEFAULT_ENCODER, load_encoder

    overrides = [text for text in args.inputs if _OVERRIDE.match(text)]
    inputs = [text for text in args.inputs if text not in overrides]
    if not inputs:
        raise ValueError("no records: name a recipe or a file of records besides the settings")
    counts = _count(itertools.chain.from_iterable(_files(text, overrides, args.stage) for text in inputs))
    assigned = _count(_record_file(text) for text in args.assign) if args.assign else Counter[str]()
    if len(counts) < args.clusters:
        raise ValueError(
            f"--clusters: {args.clusters} of {len(counts)} distinct instructions; allowed: 1 to {len(counts)}"
        )
    if args.dry_run:
        _show("the most frequent", counts.most_common(LARGEST))
        print(f"would write {args.out}: {args.clusters} clusters, {len(counts | assigned):,} instructions")
        return DONE
    encoder = args.encoder or DEFAULT_ENCODER
    encode = load_encoder(encoder, device=args.device, batch_size=args.batch_size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("encode", total=len(counts | assigned))
        table = fit_clusters(
            counts,
            encode,
            encoder=args.encoder_name or encoder,
            num_clusters=args.clusters,
            seed=args.seed,
            assigned=assigned,
            sample=args.sample,
            advance=lambda count: progress.advance(task, count),
        )
    table.save(args.out)
    by_cluster: dict[int, list[tuple[str, int]]] = {cluster: [] for cluster in range(table.num_clusters)}
    for text, count in counts.most_common():
        cluster = table.find(text)
        assert cluster is not None
        by_cluster[cluster].append((text, count))
    for cluster, members in by_cluster.items():
        records = sum(count for _, count in members)
        line = f"cluster {cluster}: {records:,} records, {len(members):,} distinct instructions"
        if cluster < LARGEST:
            _show(line, members[:SHOWN])
        else:
            print(line)
    print(f"wrote {args.out}: {table.num_clusters} clusters, {len(table.ids_I):,} instructions")
    return DONE


def _files(text: str, overrides: list[str], stage: str | None) -> list[Path]:
    """Files of records that an argument stands for."""
    from moe_lvlm.config.load import list_recipes, load_recipe
    from moe_lvlm.data.clustering import recipe_files

    if text in list_recipes() or Path(text).suffix in (".yaml", ".yml"):
        return recipe_files(load_recipe(text, overrides), stage)
    return [_record_file(text)]


def _record_file(text: str) -> Path:
    from moe_lvlm.config.load import list_recipes
    from moe_lvlm.data.llava_json import SUFFIXES
    from moe_lvlm.data.packs import resolve

    if Path(text).suffix not in SUFFIXES:
        raise ValueError(
            f"{text}: neither records nor a recipe; allowed: a file that ends in {', '.join(SUFFIXES)} or .yaml, or one "
            f"of {', '.join(list_recipes())}"
        )
    return resolve(text)


def _count(files: Iterable[Path]) -> Counter[str]:
    """How often each instruction occurs in the files, each read once."""
    from moe_lvlm.data.clustering import count_instructions
    from moe_lvlm.data.llava_json import read_records

    counts: Counter[str] = Counter()
    for file in dict.fromkeys(files):
        records = read_records(file)
        num_bad = count_instructions((records[index] for index in range(len(records))), counts)
        bad = f", {num_bad:,} of them bad and left out" if num_bad else ""
        print(f"{file}: {len(records):,} records{bad}")
    print(f"{len(counts):,} distinct instructions")
    return counts


def _show(heading: str, members: Iterable[tuple[str, int]]) -> None:
    print(heading)
    for text, count in members:
        words = " ".join(text.split())
        print(f"  {count:>7,} x {words if len(words) <= 100 else words[:97] + '...'}")


if __name__ == "__main__":
    sys.exit(main())
