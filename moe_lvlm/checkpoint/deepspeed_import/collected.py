"""Logical tensors as they are found: pieces of them in many files, checked for holes, read when they are wanted."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from moe_lvlm.checkpoint.layout import DTYPE_NAMES, CheckpointError, Kind
from moe_lvlm.checkpoint.rewrite import FlatTensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [start, start + values.numel()) of a flattened logical tensor."""

    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


@dataclass(slots=True, kw_only=True)
class Found:
    """One kind of one logical tensor so far."""

    dtype: torch.dtype
    shape: Shape
    step: float | None
    segments: list[Segment] = field(default_factory=list)


class Collected:
    """What has been found in a checkpoint.

    tensors: name -> kind -> pieces. rates: learning rate by parameter. notes: what could not be carried over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, dict[Kind, Found]] = {}
        self.rates: dict[str, float] = {}
        self.notes: dict[str, None] = {}  # a set that keeps the order

    def note(self, text: str) -> None:
        """Remember something to tell the user, once."""
        self.notes[text] = None

    def add(
        self, name: str, kind: Kind, *, shape: Shape, values: Tensor, start: int = 0, step: float | None = None
    ) -> None:
        """A piece of a logical tensor, 1-D. Raises CheckpointError where it contradicts another one."""
        if values.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{self.path}: {name} ({kind}) is {values.dtype}, allowed are {[*DTYPE_NAMES]}")
        if kind != "weight" and values.dtype != torch.float32:
            raise CheckpointError(f"{self.path}: {name} ({kind}) is {values.dtype}, allowed is torch.float32")
        kinds = self.tensors.setdefault(name, {})
        found = kinds.setdefault(kind, Found(dtype=values.dtype, shape=shape, step=step))
        if (found.dtype, found.shape, found.step) != (values.dtype, shape, step):
            raise CheckpointError(
                f"{self.path}: {name} ({kind}): files disagree: {found.dtype} {found.shape} step {found.step} against "
                f"{values.dtype} {shape} step {step}"
            )
        found.segments.append(Segment(start, values))

    def rate(self, name: str, rate: float) -> None:
        """The learning rate of a parameter. Raises CheckpointError if another was given before."""
        if self.rates.setdefault(name, rate) != rate:
            raise CheckpointError(f"{self.path}: {name} has learning rates {self.rates[name]} and {rate}")

    def flat_tensors(self) -> dict[str, dict[Kind, FlatTensor]]:
        """All of it, to be read. Raises CheckpointError unless each element of each tensor was found exactly once."""
        return {
            name: {kind: self._flat_tensor(name, kind, found) for kind, found in kinds.items()}
            for name, kinds in self.tensors.items()
        }

    def _flat_tensor(self, name: str, kind: Kind, found: Found) -> FlatTensor:
        segments = sorted((one for one in found.segments if one.values.numel()), key=lambda one: one.start)
        edges = [0, *(edge for one in segments for edge in (one.start, one.stop)), math.prod(found.shape)]
        for stop, start in list(pairwise(edges))[::2]:
            if stop != start:
                problem = f"no file has [{stop}, {start})" if stop < start else f"two files have [{start}, {stop})"
                raise CheckpointError(f"{self.path}: {name} ({kind}, {found.shape}): {problem}; the checkpoint is torn")
        starts = [one.start for one in segments]

        def read(start: int, stop: int) -> Tensor:
            values = torch.empty(stop - start, dtype=found.dtype)
            first = max(bisect_right(starts, start) - 1, 0)
            for one in segments[first:]:
                if one.start >= stop:
                    break
                low, high = max(start, one.start), min(stop, one.stop)
                values[low - start : high - start] = one.values[low - one.start : high - one.start]
            return values

        return FlatTensor(dtype=found.dtype, shape=found.shape, read=read, step=found.step)


def add_pieces(
    collected: Collected,
    name: str,
    *,
    shape: Shape,
    start: int,
    sources: Iterable[tuple[Kind, Tensor]],
    source_range: tuple[int, int],
    step: float | None,
) -> None:
    """The same range of a flat master and of its moments, all of which belong at `start` of one logical tensor."""
    low, high = source_range
    for kind, values in sources:
        if high > values.numel():
            raise CheckpointError(
                f"{collected.path}: {name} ({kind}) ends at element {high} of a rank's partition, which has "
                f"{values.numel()}: the checkpoint is torn"
            )
        collected.add(
            name, kind, shape=shape, start=start, values=values[low:high], step=None if kind == "master" else step
        )


def shapes_of(mapping: Mapping[str, Iterable[int]]) -> dict[str, Shape]:
    """Names and shapes as DeepSpeed stores them (torch.Size), in their order."""
    return {str(name): tuple(int(size) for size in shape) for name, shape in mapping.items()}
