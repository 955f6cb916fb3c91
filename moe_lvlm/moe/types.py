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
    counts_by_source: the same by the rank that they come from, [expert][rank], in which order they stand within an
        expert; None where all are from here.
    probe_R: float32 zeros. What comes back as their gradient is no derivative but a message: the cosine between the
        row's gradient on its expert's parameters and the expert's gradient over all rows of the same rank. None where
        nobody wants to know.
    """

    x_RD: Tensor
    weights_R: Tensor
    counts: tuple[int, ...]
    counts_by_source: tuple[tuple[int, ...], ...] | None = None
    probe_R: Tensor | None = None
