"""What an export of adapters writes, chosen before anything is written: base, rows, connector, table, names.

Only adapters are read for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.conversion.adapter_base import AdapterBase, base_source, choose_base, connector_source
from moe_lvlm.conversion.adapter_facts import (
    base_name,
    changed_weights,
    count_rows,
    open_table,
    row_names,
    trained_parts,
)
from moe_lvlm.conversion.adapter_rows import PlainAdapter, ReadAdapters, plain_adapters, read_adapters
from moe_lvlm.conversion.export import widest_dtype
from moe_lvlm.conversion.model_card import public_name
from moe_lvlm.conversion.processor_files import ProcessorFiles, blip_processor_files, processor_files
from moe_lvlm.conversion.provenance import Provenance, read_provenance
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.build import config_of, open_weights
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig, VLMConfig
from moe_lvlm.models.load import find_model


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """What an export writes, before it does.

    source: folder with the weights, `weights` in it. base_name: as far as it is known. base_weights: under the base's
    names in memory, merged or not, with the connector; has_base: whether they are written. connector: in a file of its
    own, None where the base has the trained one. merged: the adapter that is merged into the weights instead of writing
    all. row_names: of gates by dataset. dtype: of what is written. num_bytes: of all weights written.
    """

    source: Path
    config: VLMConfig
    weights: WeightSource
    read: ReadAdapters
    base: AdapterBase
    base_name: str | None
    has_base: bool
    base_weights: LazySource
    connector: LazySource | None
    adapters: tuple[PlainAdapter, ...]
    merged: PlainAdapter | None
    row_names: list[str] | None
    table: ClusterTable | None
    dtype: torch.dtype
    processor: ProcessorFiles
    provenance: Provenance
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        total = 0 if self.merged is not None else len(self.adapters) * _adapter_numel(self.read) * self.dtype.itemsize
        sources = (self.base_weights if self.has_base else None, self.connector)
        return total + sum(_source_bytes(source) for source in sources if source is not None)


def plan_adapters(
    path: str | Path,
    *,
    form: str = "auto",
    has_base: bool = False,
    base: str | None = None,
    clusters: Path | None = None,
    merge: str | None = None,
    dtype: torch.dtype | None = None,
) -> AdapterPlan:
    """Read the adapters of a model, and choose what is written. No other weight is read.

    path: a run, one of its checkpoints, or a model folder of ours.
    form: what adapters are put on: `vlm`, `language_model`, or `auto`, the whole model where a stock class has its form.
    has_base: write that too, with the trained connector in it.
    base: its name in the files; None is that of the model that the run began with. For a model folder, which no recipe
        belongs to, its own folder: weights that differ from it are written.
    clusters: the table, in place of the recipe's.
    merge: a cluster's number, a dataset's name, or `lora` for a single one: the adapter that is merged into the weights
        of a stock model.
    dtype: None is that of the adapters, or the widest of all weights where these are written.

    Raises:
        ValueError: none of these; gates that read hidden states; a model without adapters or without a base; weights of
            the base that were trained, or may have been, and are not written; a row that is not there.
    """
    folder, processor_folder = find_model(path)
    config, weights, origin = config_of(folder), open_weights(folder), read_provenance(folder)
    if config.adapter_settings is None:
        raise ValueError(f"{folder}: the model holds no adapters; `tools/export.py model` is for such models")
    chosen = choose_base(config, form)
    read = read_adapters(config, weights)
    table = open_table(origin, read.settings, clusters)
    names = row_names(origin, read.settings, table)
    adapters = plain_adapters(read, num_rows=count_rows(read.settings, table, names))
    merged = None if merge is None else find_row(adapters, names, merge)
    has_base = has_base or merged is not None
    named = base_name(origin) if base is None else public_name(base)
    loras = {} if merged is None else {name: read.merged(name, merged.gates) for name in read.linears}
    written_type = dtype or widest_dtype(weights if has_base else _some(weights, read.parameters))
    base_weights = base_source(chosen, read, weights, loras)
    connector: LazySource | None = None
    if merged is None and chosen.form == "language_model":
        connector = connector_source(weights)  # which it has no place for, trained or not
    if not has_base:
        connector = _beside_base(folder, weights, read, origin, base) or connector
    return AdapterPlan(
        source=folder,
        config=config,
        weights=weights,
        read=read,
        base=chosen,
        base_name=named,
        has_base=has_base,
        base_weights=base_weights.to(written_type) if has_base else base_weights,
        connector=None if connector is None else connector.to(written_type),
        adapters=adapters,
        merged=merged,
        row_names=names,
        table=table,
        dtype=written_type,
        processor=_processor(config, processor_folder, origin),
        provenance=origin,
        notes=tuple(_notes(chosen, named, origin, has_base=has_base, table=table, adapters=adapters)),
    )


def _beside_base(
    folder: Path, weights: WeightSource, read: ReadAdapters, origin: Provenance, base: str | None
) -> LazySource | None:
    """The weights that must come along where the base does not: the connector if it is another one; None for none.

    Raises:
        ValueError: others are needed too, or it is not known which.
    """
    names = [name for name in weights.names() if name not in read.parameters]
    if origin.recipe is not None:
        trained = trained_parts(origin, origin.recipe, names)
        if trained.base_parts:
            raise ValueError(
                f"{folder}: the run trained {', '.join(trained.base_parts)} besides adapters and connector, so no "
                "published base has its weights; allowed: with the base (--with-base), or merged (--merge)"
            )
        return connector_source(weights) if trained.has_connector else None
    if base is None or not resolve(base).is_dir():
        raise ValueError(
            f"{folder}: no run, so it is not known which weights are another base's; allowed: --base with the folder of "
            "the model that it was trained from, or with the base (--with-base), or merged (--merge)"
        )
    changed = changed_weights(weights, names, resolve(base))
    return changed if changed.names() else None


def find_row(adapters: tuple[PlainAdapter, ...], names: list[str] | None, wanted: str) -> PlainAdapter:
    """The adapter of a cluster by its number, of a dataset by its name, or the single LoRA by `lora`.

    Raises:
        ValueError: there is none.
    """
    found = {str(row) if names is None else names[row]: one for one in adapters for row in one.rows}
    if not found:
        found = {one.name: one for one in adapters}
    if wanted not in found:
        allowed = f"0 to {len(found) - 1}" if names is None and "0" in found else ", ".join(found)
        raise ValueError(f"merge: {wanted!r}; allowed: {allowed}")
    return found[wanted]


def _processor(config: VLMConfig, folder: Path, origin: Provenance) -> ProcessorFiles:
    if isinstance(config, MoEInstructBlipConfig):
        return blip_processor_files(folder)
    return processor_files(folder, origin)


def _notes(
    base: AdapterBase,
    name: str | None,
    origin: Provenance,
    *,
    has_base: bool,
    table: ClusterTable | None,
    adapters: tuple[PlainAdapter, ...],
) -> Iterator[str]:
    if base.reason is not None:
        yield f"the language model alone is the base, without images: {base.reason}"
    if not has_base and name is None:
        parts = None if origin.recipe is None else origin.recipe.model
        known = [
            public_name(part.from_pretrained)
            for part in (parts and parts.vision_tower, parts and parts.language_model)
            if part is not None and part.from_pretrained is not None
        ]
        of = f" ({', '.join(known)})" if known else ""
        yield f"no published model is known to be the base{of}: --with-base writes it, --base names it"
    if table is None and adapters[0].rows:
        yield "no table of clusters came along: whoever serves it must know the instructions' rows (--clusters FILE)"


def _adapter_numel(read: ReadAdapters) -> int:
    return sum(read.rank * (linear.lora_A.shape[-1] + linear.lora_B.shape[-2]) for linear in read.linears.values())


def _source_bytes(source: LazySource) -> int:
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in source.tensors.values())


def _some(weights: WeightSource, names: frozenset[str]) -> LazySource:
    return LazySource({name: LazyTensor.from_source(weights, name) for name in sorted(names)})
