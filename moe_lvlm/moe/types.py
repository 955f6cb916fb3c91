"""Small types of the MoE room."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ExpertSlice(NamedTuple):
    """The rows [start, stop) of `total` experts that a stacked expert parameter holds."""

    start: int
    stop: int
    total: int


class ExpertRows(NamedTuple):
    """Routed rows, sorted by expert.

    x_RD: one row an assignment. weights_R: float32, the weight of each assignment.
    counts: rows of each expert held here, on the host; their sum is R.
    """

    x_RD: Tensor
    weights_R: Tensor
    counts: tuple[int, ...]
