"""Small types of the MoE room.

T tokens   D model width   R routed rows   C columns of a choice   I inputs, O outputs of a linear layer
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class ExpertSlice(NamedTuple):
    """The rows [start, stop) of `total` experts that a stacked expert parameter holds."""

    start: int
    stop: int
    total: int


class LoRAChoice(NamedTuple):
    """Which LoRA experts each token, or row, takes at the adapted stacks of a layer.

    ids, gates: int64 and float32, [T, C] or [R, C]; one column a stack and LoRA expert chosen there. What a column means
    is the adapters' affair: it only travels with the row.
    """

    ids: Tensor
    gates: Tensor


class ExpertRows(NamedTuple):
    """Routed rows, sorted by expert.

    x_RD: one row an assignment. weights_R: float32, the weight of each assignment.
    counts: rows of each expert held here, on the host; their sum is R.
    counts_by_source: the same by the rank that they come from, [expert][rank], in which order they stand within an
        expert; None where all are from here.
    probe_R: float32 zeros. What comes back as their gradient is no derivative but a message: the cosine between the
        row's gradient on its expert's parameters and the expert's gradient over all rows of the same rank. None where
        nobody wants to know.
    lora: what the rows' tokens chose of LoRA experts; None where no stack has any.
    """

    x_RD: Tensor
    weights_R: Tensor
    counts: tuple[int, ...]
    counts_by_source: tuple[tuple[int, ...], ...] | None = None
    probe_R: Tensor | None = None
    lora: LoRAChoice | None = None


class ExpertAdapters(Protocol):
    """Low-rank adapters on some of the stacked matrices of a layer's experts (`adapters.stacked`)."""

    def choose(self, x_TD: Tensor) -> LoRAChoice | None:
        """The choice of each token, which goes with its rows to their experts; None where there is nothing to choose."""

    def add(self, name: str, base_RO: Tensor, x_RI: Tensor, rows: ExpertRows) -> Tensor:
        """Sum of base (which may be written into), the products of the stack `name` (w1, w2, w3) with x, and what its
        adapter gives; base itself where the stack has none."""

    def children(self) -> Iterator[nn.Module]:
        """The adapters; their own parameters have a row an expert, those of gates and tables in them do not."""
