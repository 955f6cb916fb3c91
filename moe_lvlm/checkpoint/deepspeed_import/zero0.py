"""Without ZeRO the optimizer's state has no names: tensors are numbered in the order of the optimizer's groups.

Each group's tensors are parameters in the model's order. They are matched by shape (and by value, where there is a
float32 master beside the weight); the match must be the only one there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lvlm.checkpoint.deepspeed_import.adam import OptimizerRecord
from moe_lvlm.checkpoint.deepspeed_import.collected import Collected
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record, flat
from moe_lvlm.checkpoint.deepspeed_import.weights import aliases_of
from moe_lvlm.checkpoint.layout import MOMENTS, CheckpointError

_MAX_STATES = 20_000  # of the search; more means that many parameters look alike


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor of the optimizer. shape: None where it was never stepped. master: None if the weight is its own."""

    number: int
    shape: tuple[int, ...] | None
    master: Tensor | None

    def fits(self, weight: Tensor) -> bool:
        if self.master is not None:
            return self.master.shape == weight.shape and torch.equal(self.master.to(weight.dtype), weight)
        return self.shape is None or self.shape == tuple(weight.shape)


def read_zero0(model: Record, collected: Collected) -> set[str]:
    """Add all masters and moments. Returns the names of what is trained. Raises CheckpointError if they are unclear."""
    if model.data.get("num_experts") is not None:
        raise CheckpointError(
            f"{model.where}: an MoE model saved without ZeRO: its optimizer states have no names; allowed are ZeRO 1, 2, 3"
        )
    stored = model.optional("optimizer", dict)
    weights = _parameters(model)
    if stored is None:
        collected.note("saved without an optimizer: all weights count as not trained")
        return set()
    record = Record(stored, model.where)
    is_wrapped = "optimizer_state_dict" in stored
    optimizer = OptimizerRecord(record.inside("optimizer_state_dict") if is_wrapped else record, collected)
    groups = [_slots(optimizer, group, _masters(record, group) if is_wrapped else None) for group in _range(optimizer)]
    trained: set[str] = set()
    for group, names in enumerate(_assign(weights, groups, optimizer, model)):
        for slot, name in zip(groups[group], names, strict=True):
            weight = weights[name] if slot.master is None else slot.master
            adam = optimizer.adam(slot.number, group)
            shape = tuple(weights[name].shape)
            collected.rate(name, optimizer.rate(group))
            for kind, values in adam.sources(flat(weight, f"{model.where}: {name}")):
                collected.add(name, kind, shape=shape, values=values, step=None if kind == "master" else adam.step)
            trained.add(name)
            if adam.step is None:
                collected.note(f"{name} is in the optimizer but was never stepped: it counts as trained")
    return trained


def _range(optimizer: OptimizerRecord) -> range:
    return range(len(optimizer.groups))


def _parameters(model: Record) -> dict[str, Tensor]:
    module = model.get("module", dict)
    skipped = set(model.get("buffer_names", list)) | aliases_of(model, module)
    return {name: tensor for name, tensor in module.items() if name not in skipped and isinstance(tensor, Tensor)}


def _masters(record: Record, group: int) -> Sequence[Tensor]:
    """Float32 masters of a group, of the optimizer that DeepSpeed wraps for bf16 and fp16 without ZeRO."""
    if "fp32_groups" not in record.data:
        raise CheckpointError(
            f"{record.where}: 16-bit training without ZeRO and with a fused optimizer: masters have no names; allowed are "
            f"ZeRO 1, 2, 3"
        )
    masters: Sequence[Tensor] = record.get("fp32_groups", list)[group]
    return masters


def _slots(optimizer: OptimizerRecord, group: int, masters: Sequence[Tensor] | None) -> list[_Slot]:
    numbers = optimizer.numbers(group)
    if masters is None:
        return [_Slot(number, optimizer.shape(number, MOMENTS[0]), None) for number in numbers]
    return [_Slot(number, tuple(master.shape), master) for number, master in zip(numbers, masters, strict=True)]


def _assign(
    weights: Mapping[str, Tensor], groups: Sequence[Sequence[_Slot]], optimizer: OptimizerRecord, model: Record
) -> list[list[str]]:
    """Names of each group's tensors."""
    named = [group.get("param_names") for group in optimizer.groups]
    if all(named):
        return _check_names([[str(name) for name in names] for names in named if names], weights, groups, model)
    names = list(weights)
    can_skip = sum(len(group) for group in groups) != len(names)
    # positions in the groups -> (number of ways to get there, up to 2; the last step of one of them)
    layers: list[dict[tuple[int, ...], tuple[int, Any]]] = [{(0,) * len(groups): (1, None)}]
    for name in names:
        following: dict[tuple[int, ...], tuple[int, Any]] = {}
        for positions, (ways, _) in layers[-1].items():
            choices: list[tuple[tuple[int, ...], int | None]] = [(positions, None)] if can_skip else []
            for group, position in enumerate(positions):
                if position < len(groups[group]) and groups[group][position].fits(weights[name]):
                    moved = (*positions[:group], position + 1, *positions[group + 1 :])
                    choices.append((moved, group))
            for moved, group_ in choices:
                before = following.get(moved, (0, None))[0]
                following[moved] = (min(before + ways, 2), (positions, group_))
        layers.append(following)
        if len(following) > _MAX_STATES:
            raise _unclear(model, "too many parameters look alike")
    end = tuple(len(group) for group in groups)
    ways, _ = layers[-1].get(end, (0, None))
    if ways != 1:
        raise _unclear(model, "more than one order is possible" if ways else "no order of the parameters fits")
    return _trace_back(layers, end, names, len(groups))


def _trace_back(
    layers: Sequence[Mapping[tuple[int, ...], tuple[int, Any]]], end: tuple[int, ...], names: list[str], num_groups: int
) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(num_groups)]
    positions = end
    for index in range(len(names), 0, -1):
        _, (before, group) = layers[index][positions]
        if group is not None:
            found[group].insert(0, names[index - 1])
        positions = before
    return found


def _check_names(
    named: list[list[str]], weights: Mapping[str, Tensor], groups: Sequence[Sequence[_Slot]], model: Record
) -> list[list[str]]:
    """Names that the optimizer stored itself (it was built of named parameters)."""
    for names, slots in zip(named, groups, strict=True):
        for name, slot in zip(names, slots, strict=True):
            if name not in weights or not slot.fits(weights[name]):
                raise CheckpointError(
                    f"{model.where}: the optimizer's {name!r} is no parameter of the model of that shape"
                )
    return named


def _unclear(model: Record, why: str) -> CheckpointError:
    return CheckpointError(
        f"{model.where}: saved without ZeRO, and it is unclear which optimizer state belongs to which parameter: {why}; "
        f"build the optimizer of named parameters, or save with ZeRO 1"
    )
