"""Cluster the instructions of records, for the router `cluster` and for MoCLE: write the table that a recipe names as
data.clusters, and beside it an index (.json) of what is in each cluster, for people.

INPUT is a recipe (a name, or a .yaml file), for the records of its sparse or adapted stages, a setting in place of the
recipes' (KEY=VALUE, as for `moe-lvlm train`), or a file of LLaVA records (.json, .jsonl). The instruction of a LLaVA
record is its first human turn without image marks; a record of another layout has as many as its templates give. They
are encoded with a sentence-transformers model; k-means groups the distinct ones, each counted as often as it occurs. The
table holds the centres and the cluster of every instruction; one that it does not hold goes to the nearest centre, for
which the encoder is needed again. Needs sentence-transformers and scikit-learn: moe-lvlm's extra `clusters`.

Examples:
    python tools/fit_clusters.py ltdr/cluster data.image_root=data --out data/clusters.safetensors
    python tools/fit_clusters.py mocle/instructblip --out data/mocle/clusters.safetensors
    python tools/fit_clusters.py mocle/gating_dataset --by-dataset --out data/mocle/datasets.safetensors
    python tools/fit_clusters.py mix665k.json --assign textvqa.json pope.json --out clusters.safetensors --device cuda
    python tools/fit_clusters.py package:scenes/train.json --clusters 8 --dry-run

Exit status: 0 done, 2 a mistake in the arguments or the data, 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from terminal import DONE, make_parser, run

if TYPE_CHECKING:
    from moe_lvlm.config.recipe import Recipe
    from moe_lvlm.config.records import RecordsSettings
    from moe_lvlm.data.json_files import RecordFile
    from moe_lvlm.data.layout import Layout

LARGEST = 5  # clusters whose instructions are shown
SHOWN = 3  # instructions of each
_OVERRIDE = re.compile(r"[a-z_][a-z0-9_.]*=")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="recipes, their settings, files of records")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, a .safetensors file")
    parser.add_argument("--clusters", type=int, metavar="K", help="default: the recipe's number, else 128")
    parser.add_argument("--by-dataset", action="store_true", help="a cluster a dataset, its centre their mean")
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
    if args.by_dataset and (args.clusters is not None or args.sample is not None):
        parser.error("--by-dataset: has as many clusters as datasets; leave --clusters and --sample out")
    if args.seed < 0:
        parser.error(f"--seed: {args.seed}; allowed: 0 or more")
    if args.out.suffix != ".safetensors":
        parser.error(f"--out: {args.out}; allowed: a file that ends in .safetensors")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    return run(lambda: _fit(args))


class _Dataset(NamedTuple):
    """Records to read, and what their paths are relative to."""

    settings: RecordsSettings
    base: str

    @property
    def key(self) -> tuple[str, str]:
        """The same for what is read once, whoever names it."""
        from moe_lvlm.data.mixture import resolve_path

        others = self.settings.model_dump_json(exclude={"path", "image_root", "weight", "ratio"})
        return str(resolve_path(self.settings.path, self.base)), others


def _fit(args: argparse.Namespace) -> int:
    from moe_lvlm.data.clustering import (
        cluster_index,
        dataset_table,
        fit_clusters,
    )  # after --help, which needs no torch
    from moe_lvlm.data.clusters import write_whole
    from moe_lvlm.data.encoder import DEFAULT_ENCODER, load_encoder

    overrides = [text for text in args.inputs if _OVERRIDE.match(text)]
    inputs = [text for text in args.inputs if text not in overrides]
    if not inputs:
        raise ValueError("no records: name a recipe or a file of records besides the settings")
    recipes = {text: _recipe(text, overrides) for text in inputs}
    num_clusters = args.clusters or _num_clusters([recipe for recipe in recipes.values() if recipe is not None])
    by_dataset = _count(
        itertools.chain.from_iterable(_datasets(text, recipe, args.stage) for text, recipe in recipes.items())
    )
    counts = sum(by_dataset.values(), Counter())
    print(f"{len(counts):,} distinct instructions")
    assigned: Counter[str] = Counter()
    if args.assign:
        assigned = sum(_count(_Dataset(_record_file(text), ".") for text in args.assign).values(), assigned)
    if args.by_dataset:
        num_clusters = len(by_dataset)
    elif len(counts) < num_clusters:
        raise ValueError(
            f"--clusters: {num_clusters} of {len(counts)} distinct instructions; allowed: 1 to {len(counts)}"
        )
    if args.dry_run:
        _show("the most frequent", counts.most_common(LARGEST))
        print(f"would write {args.out}: {num_clusters} clusters, {len(counts | assigned):,} instructions")
        return DONE
    encoder = args.encoder or DEFAULT_ENCODER
    encode = load_encoder(encoder, device=args.device, batch_size=args.batch_size)
    with _progress() as progress:
        task = progress.add_task("encode", total=len(counts | assigned))
        shared: dict[str, Any] = {
            "encoder": args.encoder_name or encoder,
            "assigned": assigned,
            "advance": lambda count: progress.advance(task, count),
        }
        if args.by_dataset:
            table = dataset_table(by_dataset, encode, **shared)
        else:
            table = fit_clusters(
                counts, encode, num_clusters=num_clusters, seed=args.seed, sample=args.sample, **shared
            )
    table.save(args.out)
    index = cluster_index(table, counts)
    index_file = args.out.with_suffix(".json")
    write_whole(index_file, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())
    for found in index["clusters"]:
        name = f" ({found['dataset']})" if "dataset" in found else ""
        line = (
            f"cluster {found['cluster']}{name}: {found['instructions']:,} instructions, {found['distinct']:,} distinct"
        )
        if found["cluster"] < LARGEST:
            _show(line, [(one["instruction"], one["count"]) for one in found["commonest"][:SHOWN]])
        else:
            print(line)
    print(f"wrote {args.out}: {table.num_clusters} clusters, {len(table.ids_I):,} instructions; {index_file}")
    return DONE


def _recipe(text: str, overrides: list[str]) -> Recipe | None:
    """The recipe that an argument names; None for a file of records."""
    from moe_lvlm.config.load import list_recipes, load_recipe

    if text in list_recipes() or Path(text).suffix in (".yaml", ".yml"):
        return load_recipe(text, overrides)
    return None


def _num_clusters(recipes: Sequence[Recipe]) -> int:
    """What the first recipe that goes by clusters says, else LTDR's 128."""
    from moe_lvlm.config.adapter import MoCLESettings

    for recipe in recipes:
        if isinstance(recipe.model.adapter, MoCLESettings) and recipe.model.adapter.gating == "cluster":
            return recipe.model.adapter.num_clusters
        if recipe.moe.router.kind == "cluster":
            return recipe.moe.router.num_clusters
    return 128


def _datasets(text: str, recipe: Recipe | None, stage: str | None) -> list[_Dataset]:
    """The datasets that an argument stands for."""
    from moe_lvlm.data.clustering import recipe_sources

    if recipe is None:
        return [_Dataset(_record_file(text), ".")]
    return [_Dataset(source, recipe.data.image_root) for source in recipe_sources(recipe, stage)]


def _record_file(text: str) -> RecordsSettings:
    from moe_lvlm.config.load import list_recipes
    from moe_lvlm.config.records import RecordsSettings
    from moe_lvlm.data.llava_json import SUFFIXES

    if Path(text).suffix not in SUFFIXES:
        raise ValueError(
            f"{text}: neither records nor a recipe; allowed: a file that ends in {', '.join(SUFFIXES)} or .yaml, or one "
            f"of {', '.join(list_recipes())}"
        )
    return RecordsSettings(path=text)


def _count(datasets: Iterable[_Dataset]) -> dict[str, Counter[str]]:
    """How often each instruction occurs in each dataset, by name; each is read once."""
    from moe_lvlm.data.mixture import read_dataset, source_name

    found: dict[str, Counter[str]] = {}
    for dataset in {dataset.key: dataset for dataset in datasets}.values():
        records, layout = read_dataset(dataset.settings, dataset.base)
        counts = found.setdefault(source_name(dataset.settings), Counter())
        num_bad = _read(records, layout, counts)
        bad = f", {num_bad:,} of them bad and left out" if num_bad else ""
        print(f"{records.path}: {len(records):,} records{bad}")
    return found


def _read(records: RecordFile, layout: Layout, counts: Counter[str]) -> int:
    """Count the instructions of all records; how many are bad."""
    from moe_lvlm.data.clustering import count_instructions

    with _progress() as progress:
        task = progress.add_task("read", total=len(records))
        rows = (records[index] for index in range(len(records)))
        return count_instructions(rows, counts, layout, lambda count: progress.advance(task, count))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _show(heading: str, members: Iterable[tuple[str, int]]) -> None:
    print(heading)
    for text, count in members:
        words = " ".join(text.split())
        print(f"  {count:>7,} x {words if len(words) <= 100 else words[:97] + '...'}")


if __name__ == "__main__":
    sys.exit(main())
