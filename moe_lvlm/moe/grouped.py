"""The arithmetic of rows sorted by expert, forward and backward; what autograd sees of it is in experts and conflict.

E experts held here   D model width   F FFN width   R routed rows   A, B outputs and inputs of a linear layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


class Stacks(NamedTuple):
    """Stacked parameters of all experts: w1, w3 [E, F, D]; w2 [E, D, F]; b1, b3 [E, F]; b2 [E, D]; None if absent."""

    w1: Tensor
    w2: Tensor
    w3: Tensor | None
    b1: Tensor | None
    b2: Tensor | None
    b3: Tensor | None


class Hidden(NamedTuple):
    """The two products before the activation: w1 x, and w3 x (None where the FFN is not gated)."""

    gate_RF: Tensor
    up_RF: Tensor | None

    def of(self, rows: slice) -> Hidden:
        """Those of some rows, views."""
        return Hidden(self.gate_RF[rows], None if self.up_RF is None else self.up_RF[rows])


class TakeGradient(Protocol):
    """Takes what some rows contribute to the gradient of one parameter of one expert, as a sum of outer products."""

    def __call__(self, name: str, grad_RA: Tensor, x_RB: Tensor | None) -> None:
        """name: in `Stacks`. The contribution of a row is grad x^T, [A, B], or grad alone, [A], where x is None."""


class StackGradients:
    """Memory for the gradients of the parameters by name; None where nobody asked.

    An expert without a row must still give a gradient (of 0): every rank reduces the same buckets.
    """

    def __init__(self, stacks: Stacks, counts: tuple[int, ...], needs: tuple[bool, ...]) -> None:
        """needs: whether each of the stacks wants one."""
        self.by_name = {
            name: None if stack is None or not is_needed else _empty_gradient(stack, counts)
            for (name, stack), is_needed in zip(stacks._asdict().items(), needs, strict=True)
        }

    def in_order(self) -> tuple[Tensor | None, ...]:
        """The gradients in the order of `Stacks`."""
        return tuple(self.by_name[name] for name in Stacks._fields)

    def taker(self, expert: int) -> TakeGradient:
        """Writes the gradients of one expert; all its rows must come at once."""
        return partial(self._write, expert)

    def _write(self, expert: int, name: str, grad_RA: Tensor, x_RB: Tensor | None) -> None:
        stack = self.by_name[name]
        if stack is not None:
            sum_products(grad_RA, x_RB, out=stack[expert])


def allocate_hidden(like: Tensor, num_rows: int, stacks: Stacks) -> Hidden:
    """Memory for the products of all rows."""
    width = stacks.w1.shape[1]
    return Hidden(like.new_empty(num_rows, width), None if stacks.w3 is None else like.new_empty(num_rows, width))


def forward_rows(
    expert: int, x_RD: Tensor, weights_R: Tensor, *, act: Activation, stacks: Stacks, hidden: Hidden
) -> Tensor:
    """Weighted outputs [R, D] of rows of one expert. hidden: memory for their products, which the backward pass needs."""
    activated_RF = act(_project(x_RD, stacks.w1[expert], _at(stacks.b1, expert), out=hidden.gate_RF))
    if stacks.w3 is not None and hidden.up_RF is not None:
        # not in place: an activation may hand its input back
        activated_RF = activated_RF * _project(x_RD, stacks.w3[expert], _at(stacks.b3, expert), out=hidden.up_RF)
    out_RD = _project(activated_RF, stacks.w2[expert], _at(stacks.b2, expert))
    return out_RD.mul_(weights_R[:, None].to(out_RD.dtype))


def backward_rows(
    expert: int,
    *,
    x_RD: Tensor,
    weights_R: Tensor,
    hidden: Hidden,
    grad_out_RD: Tensor,
    act: Activation,
    stacks: Stacks,
    needs_x: bool,
    needs_weights: bool,
    take: TakeGradient,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of some rows of one expert and of their weights, [R, D] and [R], None unless needed; those of the
    parameters go to `take`.

    Inner gradients are those of the output before its weight; the weight comes in with x_RD and grad_out_RD.
    """
    w1, w2, w3, b2 = stacks.w1[expert], stacks.w2[expert], _at(stacks.w3, expert), _at(stacks.b2, expert)
    up_RF = hidden.up_RF
    weight_R1 = weights_R[:, None].to(x_RD.dtype)
    with torch.enable_grad():
        gate_leaf = hidden.gate_RF.detach().requires_grad_()
        activated = act(gate_leaf)
    hidden_RF = activated.detach() if up_RF is None else activated.detach() * up_RF
    weighted_grad_RD = grad_out_RD * weight_R1
    weighted_x_RD = x_RD * weight_R1

    grad_hidden_RF = grad_out_RD @ w2
    grad_x_RD = grad_weights_R = None
    if needs_weights:
        grad_weights_R = torch.sum(hidden_RF * grad_hidden_RF, dim=-1, dtype=weights_R.dtype)
        if b2 is not None:
            grad_weights_R += grad_out_RD.to(weights_R.dtype) @ b2.to(weights_R.dtype)
    take("w2", weighted_grad_RD, hidden_RF)
    if b2 is not None:
        take("b2", weighted_grad_RD, None)

    grad_activated_RF = grad_hidden_RF if up_RF is None else grad_hidden_RF * up_RF
    (grad_gate_RF,) = torch.autograd.grad(activated, gate_leaf, grad_activated_RF)
    take("w1", grad_gate_RF, weighted_x_RD)
    if stacks.b1 is not None:
        take("b1", grad_gate_RF, weight_R1)
    if needs_x:
        grad_x_RD = grad_gate_RF @ w1
    if w3 is not None:
        grad_up_RF = grad_hidden_RF.mul_(activated.detach())
        take("w3", grad_up_RF, weighted_x_RD)
        if stacks.b3 is not None:
            take("b3", grad_up_RF, weight_R1)
        if grad_x_RD is not None:
            grad_x_RD.addmm_(grad_up_RF, w3)
    if grad_x_RD is not None:
        grad_x_RD *= weight_R1
    return grad_x_RD, grad_weights_R


def row_slices(counts: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def sum_products(grad_RA: Tensor, x_RB: Tensor | None, *, out: Tensor) -> None:
    """The sum over rows of grad x^T into `out` [A, B], or [A] where B is 1 or x is None."""
    if x_RB is None:
        torch.sum(grad_RA, dim=0, out=out)
    else:
        torch.mm(grad_RA.t(), x_RB, out=out.view(grad_RA.shape[1], x_RB.shape[1]))


def _at(stack: Tensor | None, index: int) -> Tensor | None:
    return None if stack is None else stack[index]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """A linear layer, into a tensor if one is there."""
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _empty_gradient(stack: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Memory for a stack's gradient, 0 for experts without a row."""
    grad = torch.empty_like(stack)
    for expert, count in enumerate(counts):
        if count == 0:
            grad[expert] = 0
    return grad
