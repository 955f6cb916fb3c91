"""Routed rows: which slot of which token each one is, taking them out and adding them up again.

N rows of x (tokens, or rows that arrived from other processes)   K slots of each   E experts held here
R routed rows (kept slots)   D width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lvlm.routing.types import RoutingDecision


class RowPlan(NamedTuple):
    """Kept slots in the order of their experts, within an expert in the order of x; dropless, whatever the number a token.

    slot_R: int32, the slot n * K + k of each routed row. row_NK: int32, the row of each slot, -1 where it is not kept.
    stop_E: int32, where each expert's rows end.
    counts: rows of each expert, on the host. None as long as the host has not looked at the device: slot_R then has N * K
        places, and nobody may read those after the last row.
    """

    slot_R: Tensor
    row_NK: Tensor
    stop_E: Tensor
    counts: tuple[int, ...] | None

    @property
    def source_R(self) -> Tensor:
        """Int32 [R]: the row of x that each routed row is."""
        K = self.row_NK.shape[1]
        return self.slot_R if K == 1 else self.slot_R // K

    @property
    def host_counts(self) -> tuple[int, ...]:
        """`counts` of a plan that has them."""
        assert self.counts is not None, "rows that the host has not counted"
        return self.counts

    def counted(self) -> RowPlan:
        """The same with counts: a look of the host at the device, unless it has looked before."""
        if self.counts is not None:
            return self
        stops = self.stop_E.tolist()
        counts = tuple(stop - start for start, stop in zip([0, *stops[:-1]], stops, strict=True))
        return self._replace(counts=counts, slot_R=self.slot_R[: stops[-1]])


def plan_rows(decision: RoutingDecision) -> RowPlan:
    """The plan of a decision with a row a token. On CUDA the host does not look."""
    num_experts = decision.probs_RE.shape[-1]
    if decision.keep_RK.is_cuda:
        from moe_lvlm.moe.kernels import plan  # Triton, which builds of torch without CUDA do not bring

        slot_R, row_NK, stop_E = plan(decision.expert_ids_RK, decision.keep_RK, num_experts)
        return RowPlan(slot_R, row_NK, stop_E, None)
    keep_RK = decision.keep_RK
    slot_A = keep_RK.flatten().nonzero().squeeze(1)
    expert_A = decision.expert_ids_RK.flatten()[slot_A]
    slot_R = slot_A[expert_A.argsort(stable=True)].to(torch.int32)
    counts_E = torch.bincount(expert_A, minlength=num_experts)
    return RowPlan(
        slot_R, invert(slot_R, keep_RK.shape), counts_E.cumsum(0, dtype=torch.int32), tuple(counts_E.tolist())
    )


def invert(slot_R: Tensor, shape_NK: tuple[int, ...]) -> Tensor:
    """Int32 [N, K]: the row of each slot, -1 where none is."""
    row_NK = slot_R.new_full(shape_NK, -1)
    row_NK.view(-1).index_copy_(0, slot_R.long(), torch.arange(len(slot_R), dtype=torch.int32, device=slot_R.device))
    return row_NK


def take_rows(x_ND: Tensor, plan: RowPlan) -> Tensor:
    """Each routed row's x, [R, D]."""
    rows_RD: Tensor = _TakeRows.apply(x_ND, plan)
    return rows_RD


def add_rows(y_RD: Tensor, plan: RowPlan, dtype: torch.dtype) -> Tensor:
    """Sums of each row's slots, [N, D], made in float32 and given in `dtype`; 0 where no slot is kept."""
    sum_ND: Tensor = _AddRows.apply(y_RD, plan, dtype)
    return sum_ND


def take_slots(values_NK: Tensor, plan: RowPlan) -> Tensor:
    """Each routed row's own value, [R]."""
    return values_NK.reshape(-1).index_select(0, plan.slot_R)


def gather_rows(x_ND: Tensor, plan: RowPlan) -> Tensor:
    """`take_rows` outside of autograd."""
    if x_ND.is_cuda:
        from moe_lvlm.moe.kernels import gather_rows as gather_on_gpu

        return gather_on_gpu(x_ND, *plan[:3])
    return x_ND.index_select(0, plan.source_R)


def sum_rows(y_RD: Tensor, plan: RowPlan, dtype: torch.dtype) -> Tensor:
    """`add_rows` outside of autograd."""
    if y_RD.is_cuda:
        from moe_lvlm.moe.kernels import sum_rows as sum_on_gpu

        return sum_on_gpu(y_RD, plan.row_NK, dtype)
    out_ND = start_sum(y_RD, plan)
    add_to_sum(out_ND, y_RD, plan.source_R)
    return out_ND.to(dtype)


def start_sum(like_RD: Tensor, plan: RowPlan) -> Tensor:
    """Zeros [N, D] to add rows to: float32 at least, but for rows that stand alone."""
    N, K = plan.row_NK.shape
    dtype = like_RD.dtype if K == 1 else torch.promote_types(like_RD.dtype, torch.float32)
    return like_RD.new_zeros((N, like_RD.shape[1]), dtype=dtype)


def add_to_sum(sum_ND: Tensor, y_RD: Tensor, source_R: Tensor) -> None:
    """Add rows, in place."""
    sum_ND.index_add_(0, source_R, y_RD.to(sum_ND.dtype))


def save_plan(ctx: Any, plan: RowPlan, *others: Tensor | None) -> None:
    """Keep a plan, and other tensors, for the backward pass of an autograd function. Saved as autograd saves, since what
    hangs on `ctx` itself stays in memory under checkpointing."""
    ctx.save_for_backward(plan.slot_R, plan.row_NK, plan.stop_E, *others)
    ctx.row_counts = plan.counts


def saved_plan(ctx: Any) -> tuple[RowPlan, list[Any]]:
    """What `save_plan` kept."""
    slot_R, row_NK, stop_E, *others = ctx.saved_tensors
    return RowPlan(slot_R, row_NK, stop_E, ctx.row_counts), others


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: RowPlan) -> Tensor:
        save_plan(ctx, plan)
        ctx.dtype = x_ND.dtype
        return gather_rows(x_ND, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows(grads[0], saved_plan(ctx)[0], ctx.dtype), None


class _AddRows(torch.autograd.Function):
    """Its gradient needs the plan only; index_add would keep the rows for it."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, plan: RowPlan, dtype: torch.dtype) -> Tensor:
        save_plan(ctx, plan)
        ctx.dtype = y_RD.dtype
        return sum_rows(y_RD, plan, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return gather_rows(grads[0], saved_plan(ctx)[0]).to(ctx.dtype), None, None
