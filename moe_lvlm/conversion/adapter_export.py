"""MoCLE for other programs: a plain LoRA a distinct row of its gates, the trained connector, and which LoRA is whose.

With the noise off a row's gates are constants, so PEFT, or a server that takes many LoRAs, computes with these files what
the trained model computes. Where one row is enough it is merged into the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from moe_lvlm.checkpoint.documents import SLACK_BYTES
from moe_lvlm.checkpoint.files import Advance, StreamedTensor, require_free_bytes
from moe_lvlm.checkpoint.model_folder import DEFAULT_SHARD_BYTES, WrittenFolder
from moe_lvlm.checkpoint.source import LazySource, LazyTensor
from moe_lvlm.conversion.adapter_base import on_disk
from moe_lvlm.conversion.adapter_check import (
    AdapterCheck,
    TrainedLogits,
    build_base,
    load_base,
    logits_of_base,
    logits_with_adapters,
)
from moe_lvlm.conversion.adapter_documents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS,
    BASE,
    CLUSTERS,
    CONNECTOR,
    INDEX,
    AdapterFacts,
    adapter_config,
    as_json,
    index,
    render_readme,
)
from moe_lvlm.conversion.adapter_plan import AdapterPlan
from moe_lvlm.conversion.adapter_rows import PlainAdapter
from moe_lvlm.conversion.export import check_license, export_folder
from moe_lvlm.conversion.export_check import memory_available, memory_needed
from moe_lvlm.conversion.folder import without_paths
from moe_lvlm.conversion.tree import new_folder, saved_files, write_files, write_model_tree

_CONFIG_PARTS = ("text_config", "vision_config", "qformer_config")
_CHECKED_SHARE = 0.5  # of the free memory: larger models are checked when they are asked for only


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterExport:
    """written: the folder. check: what comparing found, None if nothing was compared; not_checked: why then."""

    plan: AdapterPlan
    written: WrittenFolder
    check: AdapterCheck | None
    not_checked: str | None


def export_adapters(
    plan: AdapterPlan,
    target: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    license: str = "unknown",
    is_checked: bool | None = None,
    is_overwriting: bool = False,
    advance: Advance = lambda num_bytes: None,
) -> AdapterExport:
    """Write a planned export, and compare what was written with the trained model, every row of its gates.

    license: an identifier of the Hub, for the README. is_checked: None checks where the model fits well into the free
    memory. advance: told of the bytes of weights written, out of `plan.num_bytes`.

    Raises:
        ValueError: the target may not be written; or it computes something else (ExportCheckError), and stays to be
            looked at.
        OSError: the disk is full, or fails; nothing is left behind then.
    """
    check_license(license)
    folder = export_folder(plan.source, target, is_overwriting=is_overwriting)
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_free_bytes(folder.parent, plan.num_bytes + SLACK_BYTES)
    facts = _facts(plan, license)
    if plan.merged is not None:
        readme = {"README.md": render_readme(facts).encode()}
        num_bytes = _write_base(plan, folder, max_shard_bytes, advance, more=readme, is_overwriting=is_overwriting)
    else:
        with new_folder(folder, is_overwriting=is_overwriting) as temporary:
            num_bytes = _write_all(plan, facts, temporary, max_shard_bytes, advance)
    not_checked = None if is_checked is None else "as asked for"
    if is_checked is None:
        not_checked = check_refusal(plan)
        is_checked = not_checked is None
    check = _check(plan, folder) if is_checked else None
    return AdapterExport(
        plan=plan,
        written=WrittenFolder(folder, num_bytes, time.monotonic() - started),
        check=check,
        not_checked=None if is_checked else not_checked,
    )


def check_refusal(plan: AdapterPlan) -> str | None:
    """Why an export is not checked unless that is asked for; None if it is."""
    numel = sum(math.prod(plan.weights.shape(name)) for name in plan.weights.names())
    needed, free = memory_needed(numel), memory_available()
    if needed <= _CHECKED_SHARE * free:
        return None
    return (
        f"a check takes {needed / 1e9:.1f} GB of memory, more than {_CHECKED_SHARE:.0%} of the {free / 1e9:.1f} GB "
        "that are free"
    )


def _write_all(plan: AdapterPlan, facts: AdapterFacts, folder: Path, max_shard_bytes: int, advance: Advance) -> int:
    connector = {} if plan.connector is None else {CONNECTOR: _streams(plan.connector)}
    documents = {INDEX: as_json(index(facts)), "README.md": render_readme(facts).encode()}
    if plan.table is not None:
        save = plan.table.save
        documents |= saved_files(lambda folder: save(Path(folder) / CLUSTERS))
    num_bytes = write_files(folder, documents, connector, advance=advance)
    config = as_json(adapter_config(facts))
    for one in plan.adapters:
        below = folder / ADAPTERS / one.name
        below.mkdir(parents=True)
        num_bytes += write_files(
            below, {ADAPTER_CONFIG: config}, {ADAPTER_WEIGHTS: _lora_streams(plan, one)}, advance=advance
        )
    if plan.has_base:
        num_bytes += _write_base(plan, folder / BASE, max_shard_bytes, advance)
    return num_bytes


def _write_base(
    plan: AdapterPlan,
    folder: Path,
    max_shard_bytes: int,
    advance: Advance,
    *,
    more: Mapping[str, bytes] | None = None,
    is_overwriting: bool = False,
) -> int:
    config = plan.base.config
    for part in (config, *(getattr(config, name, None) for name in _CONFIG_PARTS)):
        if part is not None:
            part.dtype = plan.dtype
    documents = {**plan.processor.files, "config.json": as_json(without_paths(config.to_diff_dict())), **(more or {})}
    written = write_model_tree(
        folder,
        on_disk(plan.base, plan.base_weights),
        documents=documents,
        max_shard_bytes=max_shard_bytes,
        is_overwriting=is_overwriting,
        advance=advance,
    )
    return written.bytes


def _lora_streams(plan: AdapterPlan, one: PlainAdapter) -> list[StreamedTensor]:
    streams = []
    for name, linear in plan.read.linears.items():
        shapes = {
            "A": (plan.read.rank, linear.lora_A.shape[-1]),
            "B": (linear.lora_B.shape[-2], plan.read.rank),
        }
        for kind, shape in shapes.items():
            key = f"base_model.model.{plan.base.name_of(name)}.lora_{kind}.weight"
            pieces = partial(_lora_pieces, plan, one, name, kind)
            streams.append(StreamedTensor(key, plan.dtype, shape, pieces))
    return streams


def _lora_pieces(plan: AdapterPlan, one: PlainAdapter, linear: str, kind: str) -> tuple[Tensor]:
    return (getattr(plan.read.merged(linear, one.gates), kind).to(plan.dtype).contiguous(),)


def _streams(source: LazySource) -> list[StreamedTensor]:
    return [
        StreamedTensor(name, tensor.dtype, tensor.shape, partial(_whole, tensor))
        for name, tensor in source.tensors.items()
    ]


def _whole(tensor: LazyTensor) -> tuple[Tensor]:
    return (tensor.read(0, tensor.num_rows),)


def _check(plan: AdapterPlan, folder: Path) -> AdapterCheck:
    rounded = {
        name: LazyTensor.from_source(plan.weights, name).to(
            None if name in plan.read.parameters or not plan.has_base else plan.dtype
        )
        for name in plan.weights.names()
    }
    chosen = plan.adapters if plan.merged is None else (plan.merged,)
    rows = tuple(row for one in chosen for row in one.rows)
    trained = TrainedLogits(plan.config, LazySource(rounded), plan.base, rows)
    if plan.merged is not None:
        logits = logits_of_base(load_base(plan.base, folder), trained.batch)
        return trained.compare(dict.fromkeys(rows or (None,), logits), dtype=plan.dtype, what=folder)
    if plan.has_base:
        model = load_base(plan.base, folder / BASE)
    else:
        model = build_base(plan.base, plan.base_weights)
    folders: dict[Path, tuple[int | None, ...]] = {folder / ADAPTERS / one.name: one.rows or (None,) for one in chosen}
    found = logits_with_adapters(model, trained.batch, folders)
    return trained.compare(found, dtype=plan.dtype, what=folder)


def _facts(plan: AdapterPlan, license: str) -> AdapterFacts:
    return AdapterFacts(
        read=plan.read,
        base=plan.base,
        base_name=plan.base_name,
        has_base=plan.has_base,
        connector=plan.connector is not None,
        adapters=plan.adapters,
        merged=plan.merged,
        row_names=plan.row_names,
        table=plan.table,
        dtype=plan.dtype,
        provenance=plan.provenance,
        notes=plan.notes,
        prompt=plan.processor.prompt,
        license=license,
    )
