"""Opening a checkpoint of DeepSpeed: from its files to logical tensors and facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_lvlm.checkpoint.deepspeed_import.collected import Collected
from moe_lvlm.checkpoint.deepspeed_import.contents import Contents, find_tag_folder, list_contents, require_ranks
from moe_lvlm.checkpoint.deepspeed_import.facts import note_what_is_lost, read_client_state, read_engine_facts
from moe_lvlm.checkpoint.deepspeed_import.placement import AUTOEP_STACKS, ExpertPlacement, MoEKind
from moe_lvlm.checkpoint.deepspeed_import.stock_moe import is_stock_name, rename_stock_experts
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record, TorchFolder
from moe_lvlm.checkpoint.deepspeed_import.universal import read_universal
from moe_lvlm.checkpoint.deepspeed_import.weights import read_buffers, read_frozen, read_frozen_experts
from moe_lvlm.checkpoint.deepspeed_import.zero0 import read_zero0
from moe_lvlm.checkpoint.deepspeed_import.zero3 import read_frozen_zero3, read_zero3
from moe_lvlm.checkpoint.deepspeed_import.zero12 import read_zero12
from moe_lvlm.checkpoint.layout import CheckpointError
from moe_lvlm.checkpoint.rewrite import FlatTensors


@dataclass(frozen=True, kw_only=True)
class DeepSpeedCheckpoint:
    """A checkpoint of DeepSpeed, as one of ours would say it. Tensors are read when they are wanted.

    path: the folder of the tag. has_moe: which of DeepSpeed's two kinds of expert parallelism its layers are.
    tensors: masters and moments of what is trained, weights of what is not, and buffers. learning_rates: by parameter.
    engine: counters and schedule, as in our state.json. client_state: what the user stored, as far as it is plain data.
    notes: what could not be carried over, and why.
    """

    path: Path
    kind: Literal["plain", "universal"]
    has_moe: MoEKind | None
    tensors: FlatTensors
    global_steps: int
    engine: Mapping[str, Any]
    learning_rates: Mapping[str, float]
    client_state: Mapping[str, Any]
    world_size: int
    notes: Sequence[str]


def is_deepspeed_checkpoint(path: Path) -> bool:
    """Whether a path is the folder of a tag that DeepSpeed saved, or a folder whose `latest` names one."""
    try:
        find_tag_folder(Path(path), None)
    except (CheckpointError, OSError):
        return False
    return True


def open_deepspeed(path: Path, *, tag: str | None = None) -> DeepSpeedCheckpoint:
    """Open what `engine.save_checkpoint` or ds_to_universal of DeepSpeed 0.19.8 wrote.

    path: the folder of a tag, or the folder of all tags; then `tag` or its file `latest` says which. Every rank's file
    is opened and all sizes are checked; values stay on disk.

    Raises:
        CheckpointError: not such a checkpoint, an incomplete one, one of a layout that is not known, or a pickle that
            names anything but tensors and plain data.
    """
    folder = TorchFolder(find_tag_folder(Path(path), tag))
    try:
        return _open(folder)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder.root}: not the layout of DeepSpeed 0.19.8: {type(error).__name__}: {error}"
        ) from error


def _open(folder: TorchFolder) -> DeepSpeedCheckpoint:
    contents = list_contents(folder)
    collected = Collected(folder.root)
    if 0 not in contents.models:
        raise CheckpointError(f"{folder.root}: model states of rank 0 are missing: the checkpoint is torn")
    model = folder.record(contents.models[0])
    if model.get("mp_world_size", int) != 1:
        raise CheckpointError(f"{model.where}: {model.data['mp_world_size']} model-parallel ranks, allowed is 1")
    world_size = model.get("dp_world_size", int)
    placement = ExpertPlacement(model, world_size)
    _read_tensors(folder, contents, model, world_size, placement, collected)
    has_moe = _moe_kind(placement, collected)
    if has_moe == "stock":
        rename_stock_experts(collected)
    _check_experts(placement, collected)
    note_what_is_lost(model, collected)
    engine = read_engine_facts(model, collected)
    client_state = read_client_state(model, collected)
    return DeepSpeedCheckpoint(
        path=folder.root,
        kind="universal" if contents.is_universal else "plain",
        has_moe=has_moe,
        tensors=collected.flat_tensors(),
        global_steps=engine["global_steps"],
        engine=engine,
        learning_rates=collected.rates,
        client_state=client_state,
        world_size=world_size,
        notes=tuple(collected.notes),
    )


def _read_tensors(
    folder: TorchFolder,
    contents: Contents,
    model: Record,
    world_size: int,
    placement: ExpertPlacement,
    collected: Collected,
) -> None:
    models = [model]
    if contents.layout == "zero3":
        require_ranks(folder, contents.models, world_size, "model states")
        models += [folder.record(contents.models[rank]) for rank in range(1, world_size)]
    optimizers: list[Record] = []
    if contents.layout != "zero0" and not contents.is_universal:
        require_ranks(folder, contents.optimizers, world_size, "optimizer states")
        optimizers = [folder.record(contents.optimizers[rank]) for rank in range(world_size)]

    if contents.is_universal:
        trained = read_universal(folder, models, collected)
    elif contents.layout == "zero3":
        trained = read_zero3(models, optimizers, collected)
    elif contents.layout == "zero12":
        trained = read_zero12(model, optimizers, placement, collected)
    else:
        trained = read_zero0(model, collected)

    read_buffers(model, collected)
    if contents.layout == "zero3":
        read_frozen_zero3(models, collected)
    else:
        read_frozen(model, trained, placement, collected)
        read_frozen_experts(folder, contents, placement, collected)


def _moe_kind(placement: ExpertPlacement, collected: Collected) -> MoEKind | None:
    if placement.layers:
        return "autoep"
    return "stock" if any(is_stock_name(name) for name in collected.tensors) else None


def _check_experts(placement: ExpertPlacement, collected: Collected) -> None:
    """Whole experts: where they are frozen under expert parallelism, DeepSpeed may store the first rank's or none."""
    for layer in placement.layers:
        if missing := [name for name in AUTOEP_STACKS if f"{layer.prefix}.{name}" not in collected.tensors]:
            raise CheckpointError(f"{collected.path}: {layer.prefix} has no {', '.join(missing)}: it is incomplete")
    for name, kinds in collected.tensors.items():
        layer_name, found, stack = name.rpartition(".experts.")
        router = collected.tensors.get(f"{layer_name}.router.gate.weight")
        if not found or not router or stack not in ("w1", "w2", "w3", "b1", "b2", "b3"):
            continue
        rows, experts = (next(iter(one.values())).shape[0] for one in (router, kinds))
        if rows != experts:
            raise CheckpointError(
                f"{collected.path}: {name} has {experts} experts, but the layer's router has {rows}: DeepSpeed stored "
                f"only a part of the experts"
            )
