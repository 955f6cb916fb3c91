"""The experts' computation on CUDA: matrix products by expert, and one kernel for all that lies between two of them.

E experts held here   N rows of x   K slots of each   D model width   F FFN width   R routed rows (or a bound of them)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_lvlm.moe.kernels import ACTIVATIONS, activate, activate_backward, gather_rows, sum_rows
from moe_lvlm.moe.products import Products, choose_products
from moe_lvlm.moe.rows import RowPlan, save_plan, saved_plan


def can_compute(activation: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels for these experts (without biases)."""
    return activation in ACTIVATIONS and dtype != torch.float64


def compute(
    x_ND: Tensor, plan: RowPlan, weights_NK: Tensor, activation: str, w1: Tensor, w2: Tensor, w3: Tensor | None
) -> Tensor:
    """Weighted outputs, summed over the slots of each row of x, [N, D]."""
    out_ND: Tensor = FusedFFN.apply(x_ND, weights_NK, choose_products(plan, w1), ACTIVATIONS[activation], w1, w2, w3)
    return out_ND


class FusedFFN(torch.autograd.Function):
    """As `experts.RoutedFFN`, with the weight applied at the hidden rows, where it costs nothing.

    Saved are x and the two products before the activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        products: Products,
        kind: int,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor | None,
    ) -> Tensor:
        weights_NK, plan = weights_NK.contiguous(), products.plan
        x_RD = gather_rows(x_ND, *plan[:3])
        gate_RF = products.of(x_RD, w1.transpose(1, 2))
        up_RF = None if w3 is None else products.of(x_RD, w3.transpose(1, 2))
        del x_RD
        hidden_RF = activate(gate_RF, up_RF, weights_NK, plan.slot_R, plan.stop_E, kind)
        out_RD = products.of(hidden_RF, w2.transpose(1, 2))
        save_plan(ctx, plan, x_ND, weights_NK, gate_RF, up_RF, w1, w2, w3)
        ctx.kind, ctx.ways = kind, products[1:]
        return sum_rows(out_RD, plan.row_NK, x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, (x_ND, weights_NK, gate_RF, up_RF, w1, w2, w3) = saved_plan(ctx)
        products, needs = Products(plan, *ctx.ways), ctx.needs_input_grad
        grad_out_RD = gather_rows(grads[0], *plan[:3])
        hidden_RF, grad_gate_RF, grad_up_RF, grad_weights_NK = activate_backward(
            gate_RF, up_RF, weights_NK, products.of(grad_out_RD, w2), plan.slot_R, plan.stop_E, ctx.kind
        )
        grad_w1 = grad_w2 = grad_w3 = grad_x_ND = None
        if needs[5]:
            grad_w2 = products.outer(grad_out_RD, hidden_RF)
        del hidden_RF, grad_out_RD
        if needs[4] or needs[6]:
            x_RD = gather_rows(x_ND, *plan[:3])
            if needs[4]:
                grad_w1 = products.outer(grad_gate_RF, x_RD)
            if needs[6] and grad_up_RF is not None:
                grad_w3 = products.outer(grad_up_RF, x_RD)
            del x_RD
        if needs[0]:
            grad_x_RD = products.of(grad_gate_RF, w1)
            if grad_up_RF is not None:
                grad_x_RD = products.add(grad_x_RD, grad_up_RF, w3)
            grad_x_ND = sum_rows(grad_x_RD, plan.row_NK, x_ND.dtype)
        return grad_x_ND, grad_weights_NK if needs[1] else None, None, None, grad_w1, grad_w2, grad_w3
