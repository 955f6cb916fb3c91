"""A torch optimizer's state as DeepSpeed stores it: Adam's moments, its count of steps, and each group's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from moe_lvlm.checkpoint.deepspeed_import.collected import Collected
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record, flat
from moe_lvlm.checkpoint.layout import MOMENTS, CheckpointError, Kind

_KNOWN = {"step", *MOMENTS}


class AdamState(NamedTuple):
    """Flat moments of one tensor of the optimizer, and its count of steps; none and None before the first step."""

    moments: dict[Kind, Tensor]
    step: float | None

    def sources(self, master: Tensor) -> list[tuple[Kind, Tensor]]:
        """The master and its moments, by kind."""
        return [("master", master), *self.moments.items()]


class OptimizerRecord:
    """`torch.optim.Optimizer.state_dict()`: state by number, groups with the numbers of their tensors."""

    def __init__(self, record: Record, collected: Collected) -> None:
        self._state = record.get("state", dict)
        self.groups: list[dict[str, Any]] = record.get("param_groups", list)
        self._where = record.where
        self._collected = collected

    def rate(self, group: int) -> float:
        """The group's learning rate."""
        return float(Record(self.groups[group], self._where).get("lr", object))  # type: ignore[arg-type]  # int or float

    def numbers(self, group: int) -> list[int]:
        """Numbers of the group's tensors."""
        return list(Record(self.groups[group], self._where).get("params", list))

    def group_of(self, number: int) -> int:
        """The group of a tensor."""
        for index in range(len(self.groups)):
            if number in self.numbers(index):
                return index
        raise CheckpointError(f"{self._where}: tensor {number} of the optimizer is in none of its groups")

    def shape(self, number: int, kind: Kind) -> tuple[int, ...] | None:
        """Shape of a tensor's state, None if it has none."""
        values = (self._state.get(number) or {}).get(kind)
        return tuple(values.shape) if isinstance(values, Tensor) else None

    def adam(self, number: int, group: int) -> AdamState:
        """State of one tensor. What Adam does not have is noted, and the moments of that tensor are left out."""
        return read_adam(self._state.get(number) or {}, self.groups[group], self._collected, f"{self._where}: {number}")


def read_adam(state: Mapping[str, Any], options: Mapping[str, Any], collected: Collected, what: str) -> AdamState:
    """Moments and step out of a tensor's state."""
    if not state:
        return AdamState({}, None)
    if unknown := set(state) - _KNOWN:
        collected.note(
            f"optimizer state {', '.join(sorted(unknown))} is not Adam's: optimizer states were left out, weights are kept"
        )
        return AdamState({}, None)
    step = state.get("step", options.get("step"))
    missing = [kind for kind in MOMENTS if kind not in state]
    if missing or step is None:
        collected.note(f"optimizer states without {', '.join([*missing, 'step'])} were left out, weights are kept")
        return AdamState({}, None)
    return AdamState({kind: flat(state[kind], f"{what}: {kind}") for kind in MOMENTS}, float(step))
