"""Masters and moments of a universal checkpoint: a folder a parameter, `zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moe_lvlm.checkpoint.deepspeed_import.adam import OptimizerRecord, read_adam
from moe_lvlm.checkpoint.deepspeed_import.collected import Collected, Shape, shapes_of
from moe_lvlm.checkpoint.deepspeed_import.contents import UNIVERSAL_FOLDER
from moe_lvlm.checkpoint.deepspeed_import.placement import AUTOEP_STACKS, AutoEPLayer, autoep_layers
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record, TorchFolder, flat
from moe_lvlm.checkpoint.layout import MOMENTS, CheckpointError, Kind

_FILES: Mapping[Kind, str] = {"master": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}


def read_universal(folder: TorchFolder, models: Sequence[Record], collected: Collected) -> set[str]:
    """Add all masters and moments. models: the model files of all ranks. Returns the names of what is trained."""
    model = models[0]
    _refuse_misplaced(model)
    shared = folder.record(UNIVERSAL_FOLDER, "optimizer_state.pt")
    options = shared.get("param_groups", list)
    layers = {layer.prefix: layer for layer in autoep_layers(model)}
    groups = [shapes_of(group) for group in model.get("param_shapes", list)]
    steps, group_of = _by_sub_group(shared, len(groups), collected)
    for index, shapes in enumerate(groups):
        if group_of[index] >= len(options):
            raise CheckpointError(f"{shared.where}: has no optimizer group {group_of[index]}, {len(options)} in all")
        rate = float(Record(options[group_of[index]], shared.where).get("lr", object))  # type: ignore[arg-type]
        for name, shape in shapes.items():
            whole = _logical_shape(name, shape, layers, model)
            _read_parameter(folder, name, whole, options[group_of[index]], steps[index], collected)
            collected.rate(name, rate)
    return {name for shapes in groups for name in shapes}


def _read_parameter(
    folder: TorchFolder, name: str, shape: Shape, options: Mapping[str, Any], step: Any, collected: Collected
) -> None:
    where = (UNIVERSAL_FOLDER, name)
    tensors = {kind: _tensor(folder, name, file, shape) for kind, file in _FILES.items() if folder.has(*where, file)}
    if "master" not in tensors:
        raise CheckpointError(f"{folder.root.joinpath(*where, 'fp32.pt')}: no such file; the checkpoint is incomplete")
    if folder.has(*where, "step.pt"):
        step = folder.load(*where, "step.pt")
    state: dict[str, Any] = {kind: tensors[kind] for kind in MOMENTS if kind in tensors}
    if state and step is not None:
        state["step"] = step
    adam = read_adam(state, options, collected, f"{folder.root.joinpath(*where)}")
    for kind, values in adam.sources(tensors["master"]):
        collected.add(name, kind, shape=shape, values=values, step=None if kind == "master" else adam.step)


def _tensor(folder: TorchFolder, name: str, file: str, shape: Shape) -> Tensor:
    path = folder.root / UNIVERSAL_FOLDER / name / file
    data = folder.load(UNIVERSAL_FOLDER, name, file)
    values = flat(data.get("param") if isinstance(data, dict) else data, str(path))
    if values.numel() != math.prod(shape):
        raise CheckpointError(f"{path}: has {values.numel()} elements, the parameter's shape is {shape}")
    return values


def _logical_shape(name: str, shape: Shape, layers: Mapping[str, AutoEPLayer], model: Record) -> Shape:
    """Shape of the whole parameter. Only w1, w2 and w3 of experts are put together by DeepSpeed's converter."""
    prefix, _, leaf = name.rpartition(".")
    layer = layers.get(prefix)
    if layer is None or layer.num_experts == layer.num_local_experts:
        return shape
    if leaf not in AUTOEP_STACKS:
        raise CheckpointError(
            f"{model.where}: {name}: DeepSpeed's universal checkpoints do not put expert parameters other than "
            f"{', '.join(AUTOEP_STACKS)} together: take the checkpoint that it was made from"
        )
    return layer.place(name, shape, 0, model).shape


def _by_sub_group(shared: Record, num_groups: int, collected: Collected) -> tuple[list[Any], list[int]]:
    """Step and optimizer group of each list of parameters.

    At ZeRO 1 and 2 lists are groups and the step stands beside each parameter; at ZeRO 3 lists are sub-groups, and the
    steps are those in rank 0's state, which the converter copies.
    """
    if "optimizer_state_dict" not in shared.data:
        return [None] * num_groups, list(range(num_groups))
    inner = shared.inside("optimizer_state_dict")
    optimizer = OptimizerRecord(inner, collected)
    numbers = [number for group in range(len(optimizer.groups)) for number in optimizer.numbers(group)]
    if len(numbers) != num_groups:
        raise CheckpointError(f"{shared.where}: {len(numbers)} tensors for {num_groups} sub-groups of parameters")
    state = inner.get("state", dict)
    return [state.get(number, {}).get("step") for number in numbers], [optimizer.group_of(one) for one in numbers]


def _refuse_misplaced(model: Record) -> None:
    """Raise CheckpointError where DeepSpeed's converter has cut parameters at the wrong places."""
    config = model.optional("ds_config", dict) or {}
    zero = config.get("zero_optimization") or {}
    if zero.get("round_robin_gradients") and zero.get("stage") in (1, 2):
        raise CheckpointError(
            f"{model.where}: saved with round_robin_gradients, which DeepSpeed's universal checkpoints do not follow: "
            f"values are at the wrong places; take the checkpoint that it was made from"
        )
