"""Small types of the MoE room.

N rows of x   K slots of each   D model width   C columns of a choice   R routed rows   I inputs, O outputs of a linear
layer
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from moe_lvlm.moe.rows import RowPlan


class ExpertSlice(NamedTuple):
    """The rows [start, stop) of `total` experts that a stacked expert parameter holds."""

    start: int
    stop: int
    total: int


class LoRAChoice(NamedTuple):
    """Which LoRA experts each token, or row, takes at the adapted stacks of a layer.

    ids, gates: int64 and float32, [N, C] or [R, C]; one column a stack and LoRA expert chosen there. What a column means
    is the adapters' affair: it only travels with the row.
    """

    ids: Tensor
    gates: Tensor

    def of_rows(self, row_R: Tensor) -> LoRAChoice:
        """The choice of some rows."""
        return LoRAChoice(self.ids.index_select(0, row_R), self.gates.index_select(0, row_R))


class ExpertRows(NamedTuple):
    """What experts compute on: rows of x, each with slots for the experts that take it.

    x_ND: tokens, or rows that arrived from other processes, which have one slot each. plan: which of the slots are kept,
        sorted by expert. weights_NK: float32, the weight of each slot.
    counts_by_source: rows of each expert by the rank that they come from, [expert][rank], in which order they stand
        within an expert; None where all are from here.
    probe_NK: float32 zeros. What comes back as their gradient is no derivative but a message: the cosine between the
        slot's gradient on its expert's parameters and the expert's gradient over all rows of the same rank. None where
        nobody wants to know.
    lora: what the rows of x chose of LoRA experts; None where no stack has any.
    """

    x_ND: Tensor
    plan: RowPlan
    weights_NK: Tensor
    counts_by_source: tuple[tuple[int, ...], ...] | None = None
    probe_NK: Tensor | None = None
    lora: LoRAChoice | None = None


class ExpertAdapters(Protocol):
    """Low-rank adapters on some of the stacked matrices of a layer's experts (`adapters.stacked`)."""

    def choose(self, x_TD: Tensor) -> LoRAChoice | None:
        """The choice of each token, which goes with its rows to their experts; None where there is nothing to choose."""

    def add(self, name: str, base_RO: Tensor, x_RI: Tensor, counts: tuple[int, ...], lora: LoRAChoice | None) -> Tensor:
        """Sum of base (which may be written into), the products of the stack `name` (w1, w2, w3) with x, and what its
        adapter gives; base itself where the stack has none. counts: rows of each expert. lora: what each row chose."""

    def children(self) -> Iterator[nn.Module]:
        """The adapters; their own parameters have a row an expert, those of gates and tables in them do not."""
