"""What a run's recipe says about an export of its adapters: parts that were trained, the base's name, rows and their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.conversion.adapter_base import is_connector
from moe_lvlm.conversion.folder import open_model
from moe_lvlm.conversion.model_card import public_name
from moe_lvlm.conversion.provenance import Provenance
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.data.mixture import open_clusters, source_name
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.build import is_plain_llava, open_weights

_STOCK = ("llava", "instructblip")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Whether the connector is another than the base's, and which parts of the base are (as a recipe names them)."""

    has_connector: bool
    base_parts: tuple[str, ...]


def trained_parts(origin: Provenance, recipe: Recipe, names: Iterable[str]) -> Trained:
    """What the stages of a run have trained, up to the one that the checkpoint is of.

    names: of all weights that are no adapter's.
    """
    # a connector that no pretrained model brought is in no base, trained or not
    has_connector = recipe.model.from_pretrained is None
    base_parts: list[str] = []
    others = list(names)
    for stage in recipe.stages:
        for part in stage.train:
            found = _matching(part, others)
            has_connector |= part == "connector" or any(map(is_connector, found))
            if part not in ("connector", "adapter") and (
                not part.startswith("re:") or any(not is_connector(name) for name in found)
            ):
                base_parts.append(part)
        if stage is origin.stage:
            break
    return Trained(has_connector=has_connector, base_parts=tuple(dict.fromkeys(base_parts)))


def _matching(part: str, names: list[str]) -> list[str]:
    if not part.startswith("re:"):
        return []
    expression = re.compile(part.removeprefix("re:"))
    return [name for name in names if expression.search(name)]


def base_name(origin: Provenance) -> str | None:
    """The published model of plain transformers that a run began with, None where it began with none: with parts, with
    another layout, or with a model of ours. Of a path only its end is told."""
    if origin.recipe is None or (name := origin.recipe.model.from_pretrained) is None:
        return None
    folder = resolve(name)
    return None if folder.is_dir() and not _is_stock(folder) else public_name(name)


def _is_stock(folder: Path) -> bool:
    return (folder / "config.json").is_file() and AutoConfig.from_pretrained(folder).model_type in _STOCK


def changed_weights(weights: WeightSource, names: Iterable[str], base: Path) -> LazySource:
    """Those of these weights in which a model differs from a base: for models of which no recipe says what was trained.

    base: a folder in the layout of LLaVA or InstructBLIP.

    Raises:
        ValueError: it is none, or has not the same weights.
    """
    theirs = open_model(base).weights if is_plain_llava(base) else open_weights(base)
    shapes = {name: theirs.shape(name) for name in theirs.names()}
    changed = {}
    for name in names:
        if shapes.get(name) != weights.shape(name):
            raise ValueError(
                f"base: {base}: {name} has shape {shapes.get(name)}, the model's has {weights.shape(name)}; allowed: the "
                "model that it was trained from"
            )
        if not torch.equal(weights.read(name).double(), theirs.read(name).double()):
            changed[name] = LazyTensor.from_source(weights, name)
    return LazySource(changed)


def open_table(origin: Provenance, settings: LoRASettings, path: Path | None) -> ClusterTable | None:
    """The table of clusters that the run was trained with; None where gates read none, or where no one says which.

    path: in place of the recipe's.

    Raises:
        ValueError: a table that cannot be read, or has more clusters than the gates have rows.
    """
    if not isinstance(settings, MoCLESettings) or not settings.reads_table:
        if path is not None:
            raise ValueError(f"clusters: {path}, but no gate of this model reads clusters; leave it out")
        return None
    if path is not None:
        table: ClusterTable | None = ClusterTable.load(path)
    elif origin.recipe is not None:
        try:
            table = open_clusters(origin.recipe.data)
        except ValueError as error:
            raise ValueError(f"data.clusters of the run: {error}; --clusters FILE names another place") from error
    else:
        table = None
    if table is not None and table.num_clusters > settings.num_clusters:
        raise ValueError(
            f"clusters: a table of {table.num_clusters} clusters, the model's gates have {settings.num_clusters} rows; "
            "allowed: the table that it was trained with"
        )
    return table


def row_names(origin: Provenance, settings: LoRASettings, table: ClusterTable | None) -> list[str] | None:
    """Of gates by dataset the datasets' names, by row; else None."""
    if not isinstance(settings, MoCLESettings) or settings.gating != "dataset":
        return None
    if table is not None and table.datasets is not None:
        return list(table.datasets)
    if origin.recipe is None:
        return None
    mixture = (origin.stage and origin.stage.mixture) or origin.recipe.data.mixture
    return [source_name(source) for source in mixture]


def count_rows(settings: LoRASettings, table: ClusterTable | None, names: list[str] | None) -> int | None:
    """Rows of the gates that data can ask for; None is all of them."""
    if names is not None:
        return len(names)
    if isinstance(settings, MoCLESettings) and table is not None:
        return table.num_clusters
    return None
