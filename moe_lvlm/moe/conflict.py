"""How the gradient of each row agrees with the gradient of its expert, found in the experts' own backward pass (STGC).

R routed rows   D model width   A, B outputs and inputs of a linear layer
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_lvlm.moe.grouped import (
    Activation,
    Hidden,
    StackGradients,
    Stacks,
    allocate_hidden,
    backward_rows,
    forward_rows,
    row_slices,
    sum_products,
)


class ProbedFFN(torch.autograd.Function):
    """The experts' computation, answering a probe with the cosine of each row's gradient.

    A row's gradient on a linear layer is an outer product a b^T, and the expert's is their sum G, so that the inner
    product of the two is a^T G b and the row's norm |a| |b|: exact, over all of w1, w2, w3 and their biases together,
    and no row's gradient is ever made. It costs one product with G a parameter, half of what the backward pass costs
    without it. G and the mean gradient that STGC names have the same direction.

    The expert's gradient is that of one micro-batch: rows that come from different ranks are kept apart, so that
    expert parallelism changes nothing but rounding. Frozen parameters count like the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weights_R: Tensor,
        probe_R: Tensor,
        counts_by_source: tuple[tuple[int, ...], ...],
        act: Activation,
        *stacks: Any,
    ) -> Tensor:
        """counts_by_source: rows by expert and rank, the order in which they stand."""
        hidden = allocate_hidden(x_RD, len(x_RD), Stacks(*stacks))
        out_RD = x_RD.new_empty(len(x_RD), Stacks(*stacks).w2.shape[1])
        for expert, rows in row_slices(tuple(sum(parts) for parts in counts_by_source)):
            out_RD[rows] = forward_rows(
                expert, x_RD[rows], weights_R[rows], act=act, stacks=Stacks(*stacks), hidden=hidden.of(rows)
            )
        ctx.counts_by_source, ctx.act = counts_by_source, act
        ctx.save_for_backward(x_RD, weights_R, *hidden, *stacks)
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weights_R, gate_RF, up_RF, *saved = ctx.saved_tensors
        stacks = Stacks(*saved)
        needs = ctx.needs_input_grad
        counts = tuple(sum(parts) for parts in ctx.counts_by_source)
        gradients = StackGradients(stacks, counts, needs[5:])
        grad_x_RD = torch.empty_like(x_RD) if needs[0] else None
        grad_weights_R = torch.empty_like(weights_R) if needs[1] else None
        cosine_R = torch.empty_like(weights_R)
        for expert, rows, is_first in _source_slices(ctx.counts_by_source):
            agreement = _Agreement(gradients, expert, is_first=is_first)
            of_rows, of_weights = backward_rows(
                expert,
                x_RD=x_RD[rows],
                weights_R=weights_R[rows],
                hidden=Hidden(gate_RF, up_RF).of(rows),
                grad_out_RD=grads[0][rows],
                act=ctx.act,
                stacks=stacks,
                needs_x=needs[0],
                needs_weights=needs[1],
                take=agreement,
            )
            if grad_x_RD is not None and of_rows is not None:
                grad_x_RD[rows] = of_rows
            if grad_weights_R is not None and of_weights is not None:
                grad_weights_R[rows] = of_weights
            cosine_R[rows] = agreement.cosine()
        return (grad_x_RD, grad_weights_R, cosine_R, None, None, *gradients.in_order())


def _source_slices(counts_by_source: tuple[tuple[int, ...], ...]) -> Iterator[tuple[int, slice, bool]]:
    """Each expert and rank that have rows: the expert, where the rows are, whether they are the expert's first."""
    start = 0
    for expert, parts in enumerate(counts_by_source):
        first = start
        for count in parts:
            if count:
                yield expert, slice(start, start + count), start == first
                start += count


class _Agreement:
    """Adds up, parameter by parameter, what the cosines of one rank's rows at one expert need.

    is_first: whether `gradients` hold nothing of this expert yet.
    """

    def __init__(self, gradients: StackGradients, expert: int, *, is_first: bool) -> None:
        self.gradients = gradients
        self.expert = expert
        self.is_first = is_first
        self.inner_R: Tensor | None = None
        self.norm_R: Tensor | None = None
        self.total_norm: Tensor | None = None

    def __call__(self, name: str, grad_RA: Tensor, x_RB: Tensor | None) -> None:
        total_AB = self._total(name, grad_RA, x_RB)
        precise = torch.promote_types(total_AB.dtype, torch.float32)
        total_norm = torch.linalg.vector_norm(total_AB, dtype=precise)
        # Of length 1, since in half precision the product with an unscaled gradient may leave the range of numbers
        direction_AB = (total_AB / total_norm.clamp_min(torch.finfo(precise).tiny)).to(grad_RA.dtype)
        norm_R = torch.linalg.vector_norm(grad_RA, dim=-1, dtype=precise)
        if x_RB is None:
            projected_RA = direction_AB
        else:
            projected_RA = x_RB @ direction_AB.view(-1, x_RB.shape[1]).t()
            norm_R = norm_R * torch.linalg.vector_norm(x_RB, dim=-1, dtype=precise)
        inner_R = (projected_RA.to(precise) * grad_RA).sum(dim=-1) * total_norm
        self.inner_R = inner_R if self.inner_R is None else self.inner_R + inner_R
        self.norm_R = norm_R if self.norm_R is None else torch.hypot(self.norm_R, norm_R)
        self.total_norm = total_norm if self.total_norm is None else torch.hypot(self.total_norm, total_norm)

    def _total(self, name: str, grad_RA: Tensor, x_RB: Tensor | None) -> Tensor:
        """This rank's gradient of a parameter of the expert, which it also leaves in or adds to `gradients`."""
        stack = self.gradients.by_name[name]
        if stack is not None and self.is_first:
            sum_products(grad_RA, x_RB, out=stack[self.expert])
            return stack[self.expert]
        total_AB = grad_RA.new_empty(grad_RA.shape[1], *(() if x_RB is None else x_RB.shape[1:]))
        sum_products(grad_RA, x_RB, out=total_AB)
        if stack is not None:
            stack[self.expert] += total_AB.view_as(stack[self.expert])
        return total_AB

    def cosine(self) -> Tensor:
        """[R], 1 where the row or the expert has no gradient: nothing is in conflict there."""
        assert self.inner_R is not None and self.norm_R is not None and self.total_norm is not None
        product_R = self.norm_R * self.total_norm
        return torch.where(product_R > 0, self.inner_R / product_R, 1.0)
