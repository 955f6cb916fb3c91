"""Products of LoRA experts: by sample, where a row of the batch holds one, by token, and by groups of routed rows.

B batch   S sequence   T tokens   E' experts, the universal one last   J experts of a sample   R = J x rank
I inputs, O outputs of a linear   r rank   N rows that were decided for   G groups of rows   A rows of all groups
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_lvlm.moe.experts import multiply_rows
from moe_lvlm.moe.grouped import row_slices, sum_products
from moe_lvlm.moe.rows import add_rows, plan_rows, take_rows, take_slots
from moe_lvlm.routing.types import RoutingDecision


def add_lora(base_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, *, scale: float | Tensor) -> Tensor:
    """Sum of base (which is written into) and B (scale A x), all tokens alike. scale: a number, or one a token [T, 1]."""
    hidden_TR = nn.functional.linear(x_TI, a_RI)
    return _add(base_TO, (hidden_TR * _as(scale, hidden_TR))[None], b_OR.t()[None])


def add_sample_experts(
    base_TO: Tensor,
    x_BSI: Tensor,
    lora_a_ErI: Tensor,
    lora_b_EOr: Tensor,
    *,
    expert_ids_BJ: Tensor,
    weights_BJ: Tensor,
) -> Tensor:
    """Sum of base (which is written into) and the experts of each row of the batch, laid side by side to one LoRA of
    rank R.

    Their matrices are gathered by row and their weights applied to the R numbers a token between A and B; no other
    expert is computed. An embedding's gradient, unlike an indexed sum, is the same in every run on a GPU.
    """
    rank, num_inputs = lora_a_ErI.shape[1:]
    num_outputs = lora_b_EOr.shape[1]
    batch = expert_ids_BJ.shape[0]
    a_BRI = nn.functional.embedding(expert_ids_BJ, lora_a_ErI.flatten(1)).view(batch, -1, num_inputs)
    b_BRO = nn.functional.embedding(expert_ids_BJ, lora_b_EOr.transpose(1, 2).flatten(1)).view(batch, -1, num_outputs)
    weight_B1R = weights_BJ.repeat_interleave(rank, dim=1)[:, None]
    hidden_BSR = torch.bmm(x_BSI, a_BRI.transpose(1, 2))
    return _add(base_TO, hidden_BSR * _as(weight_B1R, hidden_BSR), b_BRO)


def _add(base_TO: Tensor, hidden_BSR: Tensor, b_BRO: Tensor) -> Tensor:
    out_TO = _AddProducts.apply(base_TO.to(hidden_BSR.dtype), hidden_BSR, b_BRO.to(hidden_BSR.dtype))
    return out_TO.to(base_TO.dtype)


class _AddProducts(torch.autograd.Function):
    """Adds hidden x b of each row of the batch to the base, in place: a copy of it costs as much as the experts do."""

    @staticmethod
    def forward(ctx: Any, base_TO: Tensor, hidden_BSR: Tensor, b_BRO: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_BSR, b_BRO)
        ctx.mark_dirty(base_TO)
        base_TO.view(*hidden_BSR.shape[:2], -1).baddbmm_(hidden_BSR, b_BRO)
        return base_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BSR, b_BRO = ctx.saved_tensors
        grad_BSO = grads[0].reshape(*hidden_BSR.shape[:2], -1)
        needs = ctx.needs_input_grad
        return (
            grads[0] if needs[0] else None,
            torch.bmm(grad_BSO, b_BRO.transpose(1, 2)) if needs[1] else None,
            torch.bmm(hidden_BSR.transpose(1, 2), grad_BSO) if needs[2] else None,
        )


def add_token_experts(
    base_TO: Tensor, x_TI: Tensor, lora_a_ErI: Tensor, lora_b_EOr: Tensor, *, decision: RoutingDecision
) -> Tensor:
    """Sum of base and the experts of each token: tokens are sorted by expert, and each expert computes its own."""
    plan = plan_rows(decision).counted()
    x_RI, weights_R = take_rows(x_TI, plan), take_slots(decision.weights_RK, plan)
    outputs = []
    # Experts without a row take part, with none: what ranks reduce must not depend on who was chosen.
    for expert_x_RI, expert_weights_R, a_rI, b_Or in zip(
        x_RI.split(plan.host_counts),
        weights_R.split(plan.host_counts),
        lora_a_ErI.unbind(),
        lora_b_EOr.unbind(),
        strict=True,
    ):
        hidden_Rr = nn.functional.linear(expert_x_RI, a_rI)
        outputs.append(nn.functional.linear(hidden_Rr * _as(expert_weights_R[:, None], hidden_Rr), b_Or))
    return base_TO + add_rows(torch.cat(outputs), plan, x_TI.dtype).to(base_TO.dtype)


def add_grouped_experts(
    base_NO: Tensor,
    x_NI: Tensor,
    a_GRI: Tensor,
    b_GOR: Tensor,
    *,
    counts: tuple[int, ...],
    weights_AR: float | Tensor,
    row_A: Tensor | None = None,
) -> Tensor:
    """Sum of base (which is written into) and B (weights A x), with the matrices of each row's groups.

    a_GRI, b_GOR: [..., R, I] and [..., O, R], G matrices each. counts: rows of each group, which stand one after the
    other. row_A: int64, which row of x each of them is, no row twice in a group; None where they are the rows of x in
    their order. weights_AR: numbers, or one for all.
    """
    hidden_AR = multiply_rows(x_NI, a_GRI, counts=counts, row_A=row_A)
    out_NO = _AddRows.apply(
        base_NO.to(hidden_AR.dtype), row_A, hidden_AR * _as(weights_AR, hidden_AR), b_GOR.to(hidden_AR.dtype), counts
    )
    return out_NO.to(base_NO.dtype)


class _AddRows(torch.autograd.Function):
    """Adds hidden x b of each group to the base, in place. A row is once in a group, and groups come one after the
    other, so the sum is the same in every run on a GPU."""

    @staticmethod
    def forward(
        ctx: Any,
        base_NO: Tensor,
        row_A: Tensor | None,
        hidden_AR: Tensor,
        b_GOR: Tensor,
        counts: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(row_A, hidden_AR, b_GOR)
        ctx.counts = counts
        ctx.mark_dirty(base_NO)
        matrices_GOR = b_GOR.reshape(-1, *b_GOR.shape[-2:])
        for group, rows in row_slices(counts):
            if row_A is None:
                base_NO[rows].addmm_(hidden_AR[rows], matrices_GOR[group].t())
            else:
                base_NO.index_add_(0, row_A[rows], hidden_AR[rows] @ matrices_GOR[group].t())
        return base_NO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_A, hidden_AR, b_GOR = ctx.saved_tensors
        needs = ctx.needs_input_grad
        matrices_GOR = b_GOR.reshape(-1, *b_GOR.shape[-2:])
        grad_hidden_AR = torch.empty_like(hidden_AR) if needs[2] else None
        # Groups without a row must still give a gradient (of 0): every rank reduces the same buckets.
        grad_b_GOR = torch.zeros_like(matrices_GOR) if needs[3] else None
        for group, rows in row_slices(ctx.counts):
            grad_AO = grads[0][rows if row_A is None else row_A[rows]]
            if grad_hidden_AR is not None:
                torch.mm(grad_AO, matrices_GOR[group], out=grad_hidden_AR[rows])
            if grad_b_GOR is not None:
                sum_products(grad_AO, hidden_AR[rows], out=grad_b_GOR[group])
        grad_b = None if grad_b_GOR is None else grad_b_GOR.view(b_GOR.shape)
        return (grads[0] if needs[0] else None, None, grad_hidden_AR, grad_b, None)


def _as(scale: float | Tensor, like: Tensor) -> float | Tensor:
    """A weight in the type of what it multiplies."""
    return scale.to(like.dtype) if isinstance(scale, Tensor) else scale
