"""Build the pack mocle: the tables of clusters of MoCLE's tiny recipes, whose encoder is not installed by default.

Example:
    python tools/make_mocle_pack.py --encoder all-MiniLM-L6-v2/ --out moe_lvlm/data/packs/mocle

A table is fitted on what a recipe trains on at tiny scale, as tools/fit_clusters.py does; its evaluation sets' instructions
get the cluster whose centre is nearest. The records of the conflict (tools/conflict_records.py), with their tables, are in
the pack too. Make the pack anew when the packs scenes or scene_tasks have other records, or the tiny recipes other
templates: tests say so. Takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from conflict_records import WORDINGS, conflict_files
from numpy.typing import NDArray
from pack_files import check_replaceable, replaced, write_zip
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data.clustering import (
    cluster_index,
    count_instructions,
    dataset_table,
    encode_all,
    fit_clusters,
    recipe_sources,
)
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.data.encoder import DEFAULT_ENCODER, Encode, load_encoder
from moe_lvlm.data.mixture import read_dataset, source_name
from moe_lvlm.data.packs import resolve
from moe_lvlm.data.packs.archive import write_manifest

VERSION = "1"
# Recipe -> the pack that it reads, and its numbers of clusters (table 1 and figure 3).
TABLES = {"mocle/instructblip_mocle": ("scene_tasks", (4, 16, 64, 256)), "mocle/llava_mocle": ("scenes", (4,))}
BY_DATASET = "mocle/instructblip_mocle"
CONFLICT_CLUSTERS = 16  # fewer mix the datasets, whose instructions are of 60 kinds
LICENSES = """\
# Licences of the pack mocle

The tables hold means of embeddings of questions and instructions, computed with all-MiniLM-L6-v2 by the authors of
Sentence Transformers: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2. Licence: Apache-2.0. The model itself
is not in the pack. The questions are those of the packs scenes and scene_tasks, and records about the pictures of the pack
scenes: made for moe_lvlm.
"""


def main() -> None:
    arguments = _parse()
    encode = load_encoder(arguments.encoder, device="cpu")  # at once: it may be missing
    with replaced(arguments.out) as pack:
        build(pack, encode, seed=arguments.seed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, help="folder or hub name of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, required=True, help="the pack's folder; an earlier pack there is replaced")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    check_replaceable(parser, arguments.out)
    return arguments


def build(pack: Path, encode: Encode, *, seed: int) -> None:
    """Write the whole pack into the empty folder `pack`. encode: texts to embeddings."""
    facts = {}
    for name, (source, numbers) in TABLES.items():
        recipe = load_recipe(name, ["scale=tiny"])
        by_dataset, asked = trained_on(recipe), evaluated_on(recipe)
        counts = sum(by_dataset.values(), Counter[str]())
        known = remembered(sorted(counts | asked), encode)
        tables = {
            f"{source}_{number}": fit_clusters(
                counts, known, encoder=DEFAULT_ENCODER, num_clusters=number, seed=seed, assigned=asked
            )
            for number in numbers
        }
        if name == BY_DATASET:
            tables[f"{source}_datasets"] = dataset_table(by_dataset, known, encoder=DEFAULT_ENCODER, assigned=asked)
        for table_name, table in tables.items():
            table.save(pack / f"{table_name}.safetensors")
            write_index(pack / f"{table_name}.json", table, counts)
            facts[table_name] = f"{table.num_clusters} clusters of {len(table.ids_I)} instructions ({name})"
    facts |= write_conflict(pack, encode, seed=seed)
    (pack / "LICENSES.md").write_text(LICENSES, encoding="utf-8")
    write_manifest(
        pack,
        {
            "name": "mocle",
            "version": VERSION,
            "made_by": "tools/make_mocle_pack.py",
            "seed": seed,
            "encoder": DEFAULT_ENCODER,
            "tables": facts,
        },
    )


def write_conflict(pack: Path, encode: Encode, *, seed: int) -> dict[str, str]:
    """Write the conflict's records and their tables; returns what the manifest says of the tables."""
    files = conflict_files(resolve("package:scenes"), seed=seed)
    texts = {f"conflict/{name}": json.dumps(rows, separators=(",", ":")).encode() for name, rows in files.items()}
    write_zip(pack / "conflict.zip", texts, compression=zipfile.ZIP_LZMA)
    counted: dict[str, Counter[str]] = {}
    for name, rows in files.items():
        counted[Path(name).stem] = Counter()
        count_instructions(rows, counted[Path(name).stem])
    by_dataset = {name: counted[name] for name in WORDINGS}
    counts, asked = sum(by_dataset.values(), Counter[str]()), counted["test"] + counted["new"]
    known = remembered(sorted(counts | asked), encode)
    tables = {
        f"conflict_{CONFLICT_CLUSTERS}": fit_clusters(
            counts, known, encoder=DEFAULT_ENCODER, num_clusters=CONFLICT_CLUSTERS, seed=seed, assigned=asked
        ),
        "conflict_datasets": dataset_table(by_dataset, known, encoder=DEFAULT_ENCODER, assigned=asked),
    }
    for name, table in tables.items():
        table.save(pack / f"{name}.safetensors")
        write_index(pack / f"{name}.json", table, counts)
    return {name: f"{table.num_clusters} clusters of {len(table.ids_I)} instructions" for name, table in tables.items()}


def trained_on(recipe: Recipe) -> dict[str, Counter[str]]:
    """How often each instruction occurs in each dataset that the adapted stage trains on."""
    base = recipe.data.image_root
    return {source_name(source): _count(source, base) for source in recipe_sources(recipe)}


def evaluated_on(recipe: Recipe) -> Counter[str]:
    """How often each instruction occurs in the evaluation sets."""
    base = recipe.data.image_root
    counts = (_count(task, base, for_evaluation=True) for task in recipe.evaluation.tasks)
    return sum(counts, Counter[str]())


def remembered(texts: list[str], encode: Encode) -> Encode:
    """An encoder that gives what it was made with again, each text encoded once."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("encoding", total=len(texts))
        embeddings = encode_all(texts, encode, advance=lambda count: progress.advance(task, count))
    place = {text: index for index, text in enumerate(texts)}

    def known(wanted: Sequence[str]) -> NDArray[np.float32]:
        if all(text in place for text in wanted):
            return embeddings[[place[text] for text in wanted]]
        return encode(wanted)

    return known


def write_index(path: Path, table: ClusterTable, counts: Counter[str]) -> None:
    text = json.dumps(cluster_index(table, counts, shown=3), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _count(settings: RecordsSettings, base: str, *, for_evaluation: bool = False) -> Counter[str]:
    records, layout = read_dataset(settings, base, for_evaluation=for_evaluation)
    counts: Counter[str] = Counter()
    num_bad = count_instructions((records[index] for index in range(len(records))), counts, layout)
    if num_bad:
        raise ValueError(f"{records.path}: {num_bad} bad records; a pack's are good")
    return counts


if __name__ == "__main__":
    main()
