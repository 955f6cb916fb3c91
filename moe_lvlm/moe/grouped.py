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


class TakeGradient(Protocol):
    """Takes what some rows contribute to the gradient of one parameter of one expert, as a sum of outer products."""

    def __call__(self, name: str, grad_RA: Tensor, x_RB: Tensor | None) -> None:
        """name: in `Stacks`. The contribution of a row is grad x^T, [A, B], or grad alone, [A], where x is None."""


class BackwardOutputs(NamedTuple):
    """Gradients of rows and their weights, and of the parameters by name; None where nobody asked."""

    x_RD: Tensor | None
    weights_R: Tensor | None
    stacks: dict[str, Tensor | None]

    @staticmethod
    def allocate(
        x_RD: Tensor, weights_R: Tensor, stacks: Stacks, counts: tuple[int, ...], needs: tuple[bool, ...]
    ) -> BackwardOutputs:
        """Memory to write gradients into. needs: whether rows, weights and each of the stacks wants one.

        An expert without a row must still give a gradient (of 0): every rank reduces the same buckets.
        """
        return BackwardOutputs(
            torch.empty_like(x_RD) if needs[0] else None,
            torch.empty_like(weights_R) if needs[1] else None,
            {
                name: None if stack is None or not is_needed else _empty_gradient(stack, counts)
                for (name, stack), is_needed in zip(stacks._asdict().items(), needs[2:], strict=True)
            },
        )

    def in_order(self) -> tuple[Tensor | None, ...]:
        """The parameters' gradients in the order of `Stacks`."""
        return tuple(self.stacks[name] for name in Stacks._fields)

    def taker(self, expert: int) -> TakeGradient:
        """Writes the gradients of one expert; all its rows must come at once."""
        return partial(self._write, expert)

    def _write(self, expert: int, name: str, grad_RA: Tensor, x_RB: Tensor | None) -> None:
        stack = self.stacks[name]
        if stack is not None:
            sum_products(grad_RA, x_RB, out=stack[expert])


def forward_rows(
    x_RD: Tensor, weights_R: Tensor, counts: tuple[int, ...], act: Activation, stacks: Stacks
) -> tuple[Tensor, Hidden]:
    """Weighted outputs [R, D], and what the backward pass needs."""
    num_rows, ffn_width = x_RD.shape[0], stacks.w1.shape[1]
    gate_RF = x_RD.new_empty(num_rows, ffn_width)
    up_RF = None if stacks.w3 is None else x_RD.new_empty(num_rows, ffn_width)
    out_RD = x_RD.new_empty(num_rows, stacks.w2.shape[1])
    for expert, rows in row_slices(counts):
        hidden = act(_project(x_RD[rows], stacks.w1[expert], _at(stacks.b1, expert), out=gate_RF[rows]))
        if stacks.w3 is not None and up_RF is not None:
            # not in place: an activation may hand its input back
            hidden = hidden * _project(x_RD[rows], stacks.w3[expert], _at(stacks.b3, expert), out=up_RF[rows])
        _project(hidden, stacks.w2[expert], _at(stacks.b2, expert), out=out_RD[rows])
    out_RD *= weights_R[:, None].to(out_RD.dtype)
    return out_RD, Hidden(gate_RF, up_RF)


def backward_rows(
    rows: slice,
    expert: int,
    *,
    x_RD: Tensor,
    weights_R: Tensor,
    hidden: Hidden,
    grad_out_RD: Tensor,
    act: Activation,
    stacks: Stacks,
    outputs: BackwardOutputs,
    take: TakeGradient,
) -> None:
    """Gradients of some rows of one expert: of the rows and their weights into `outputs`, of the parameters to `take`.

    Inner gradients are those of the output before its weight; the weight comes in with x_RD and grad_out_RD.
    """
    w1, w2, w3, b2 = stacks.w1[expert], stacks.w2[expert], _at(stacks.w3, expert), _at(stacks.b2, expert)
    up_RF = _at(hidden.up_RF, rows)
    grad_x_RD, grad_weight_R = _at(outputs.x_RD, rows), _at(outputs.weights_R, rows)
    weight_R1 = weights_R[rows, None].to(x_RD.dtype)
    grad_out_RD = grad_out_RD[rows]
    with torch.enable_grad():
        gate_leaf = hidden.gate_RF[rows].detach().requires_grad_()
        activated = act(gate_leaf)
    hidden_RF = activated.detach() if up_RF is None else activated.detach() * up_RF
    weighted_grad_RD = grad_out_RD * weight_R1
    weighted_x_RD = x_RD[rows] * weight_R1

    grad_hidden_RF = grad_out_RD @ w2
    if grad_weight_R is not None:
        torch.sum(hidden_RF * grad_hidden_RF, dim=-1, dtype=grad_weight_R.dtype, out=grad_weight_R)
        if b2 is not None:
            grad_weight_R += grad_out_RD.to(grad_weight_R.dtype) @ b2.to(grad_weight_R.dtype)
    take("w2", weighted_grad_RD, hidden_RF)
    if b2 is not None:
        take("b2", weighted_grad_RD, None)

    grad_activated_RF = grad_hidden_RF if up_RF is None else grad_hidden_RF * up_RF
    (grad_gate_RF,) = torch.autograd.grad(activated, gate_leaf, grad_activated_RF)
    take("w1", grad_gate_RF, weighted_x_RD)
    if stacks.b1 is not None:
        take("b1", grad_gate_RF, weight_R1)
    if grad_x_RD is not None:
        torch.mm(grad_gate_RF, w1, out=grad_x_RD)
    if w3 is not None:
        grad_up_RF = grad_hidden_RF.mul_(activated.detach())
        take("w3", grad_up_RF, weighted_x_RD)
        if stacks.b3 is not None:
            take("b3", grad_up_RF, weight_R1)
        if grad_x_RD is not None:
            grad_x_RD.addmm_(grad_up_RF, w3)
    if grad_x_RD is not None:
        grad_x_RD *= weight_R1


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


def _at(stack: Tensor | None, index: int | slice) -> Tensor | None:
    return None if stack is None else stack[index]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """A linear layer into a tensor that is there."""
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _empty_gradient(stack: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Memory for a stack's gradient, 0 for experts without a row."""
    grad = torch.empty_like(stack)
    for expert, count in enumerate(counts):
        if count == 0:
            grad[expert] = 0
    return grad
