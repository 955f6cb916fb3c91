"""The experts of one layer: stacked FFNs, and the computation of rows sorted by expert.

E experts held here   D model width   F FFN width   R routed rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_lvlm.moe.types import ExpertRows

Activation = Callable[[Tensor], Tensor]


class Experts(nn.Module):
    """E feed-forward networks with stacked parameters, weighted by the router.

    Gated (LLaMA, Qwen, Mistral, Phi-3, StableLM): w2 (act(w1 x) * (w3 x)). Not gated (Phi-2, ViT, BERT): w2 act(w1 x).
    w1, w3: [E, F, D]; w2: [E, D, F]; biases, where the dense FFN has them: b1, b3 [E, F] and b2 [E, D]. The names
    w1, w2, w3 are those of DeepSpeed's expert-parallel layers.

    activation: a name in transformers' ACT2FN.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        model_width: int,
        ffn_width: int,
        activation: str,
        is_gated: bool = True,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACT2FN:
            raise ValueError(f"activation: {activation!r} is not one of {sorted(ACT2FN)}")
        self.num_experts = num_experts
        self.activation = activation
        # Its function, not the module: under ZeRO-3 every rank must call the same modules, and each expert that has rows
        # calls this once.
        self.act: Activation = ACT2FN[activation].forward
        E, D, F = num_experts, model_width, ffn_width
        self.w1 = nn.Parameter(torch.empty(E, F, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F))
        self.w3 = nn.Parameter(torch.empty(E, F, D)) if is_gated else None
        self.b1 = nn.Parameter(torch.empty(E, F)) if has_bias else None
        self.b2 = nn.Parameter(torch.empty(E, D)) if has_bias else None
        self.b3 = nn.Parameter(torch.empty(E, F)) if has_bias and is_gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, N(0, 0.02), biases 0: experts that were not copied from a dense FFN."""
        for name, parameter in self.named_parameters():
            if name.startswith("w"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(self, rows: ExpertRows) -> Tensor:
        """Weighted outputs [R, D] of rows sorted by expert; `rows.counts` has one number an expert held here."""
        if len(rows.counts) != self.w1.shape[0]:
            raise ValueError(f"{len(rows.counts)} row counts for {self.w1.shape[0]} experts")
        stacks = (self.w1, self.w2, self.w3, self.b1, self.b2, self.b3)
        # The weights' own type decides, also under autocast, which knows nothing of results written in place.
        with torch.autocast(rows.x_RD.device.type, enabled=False):
            return _GroupedFFN.apply(rows.x_RD.to(self.w1.dtype), rows.weights_R, rows.counts, self.act, *stacks)


class _GroupedFFN(torch.autograd.Function):
    """Expert by expert, saving only the rows and the two products before the activation; the rest is computed again.

    No output is kept for the gradient of the router's weight, which is taken at the hidden row. The weight itself is
    applied at width D, never at width F: to the output, and in the backward pass to the rows and their gradients.
    A parameter is saved whole, never a view of it: ZeRO-3 takes its storage away after the forward pass and gives it
    back before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weights_R: Tensor,
        counts: tuple[int, ...],
        act: Activation,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor | None,
        b1: Tensor | None,
        b2: Tensor | None,
        b3: Tensor | None,
    ) -> Tensor:
        num_rows, ffn_width = x_RD.shape[0], w1.shape[1]
        gate_RF = x_RD.new_empty(num_rows, ffn_width)
        up_RF = None if w3 is None else x_RD.new_empty(num_rows, ffn_width)
        out_RD = x_RD.new_empty(num_rows, w2.shape[1])
        for expert, rows in _row_slices(counts):
            hidden = act(_project(x_RD[rows], w1[expert], _at(b1, expert), out=gate_RF[rows]))
            if w3 is not None and up_RF is not None:
                # not in place: an activation may hand its input back
                hidden = hidden * _project(x_RD[rows], w3[expert], _at(b3, expert), out=up_RF[rows])
            _project(hidden, w2[expert], _at(b2, expert), out=out_RD[rows])
        out_RD *= weights_R[:, None].to(out_RD.dtype)
        ctx.counts, ctx.act = counts, act
        ctx.save_for_backward(x_RD, weights_R, gate_RF, up_RF, w1, w2, w3, b1, b2, b3)
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weights_R, gate_RF, up_RF, *stacks = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # An expert without a row must still give a gradient (of 0): every rank reduces the same buckets.
        grad_of = {
            name: None if stack is None or not needs[index] else _empty_gradient(stack, ctx.counts)
            for index, (name, stack) in enumerate(zip(_STACKS, stacks, strict=True), start=4)
        }
        grad_x_RD = torch.empty_like(x_RD) if needs[0] else None
        grad_weights_R = torch.empty_like(weights_R) if needs[1] else None
        for expert, rows in _row_slices(ctx.counts):
            _expert_backward(
                expert=expert,
                act=ctx.act,
                x_RD=x_RD[rows],
                weight_R1=weights_R[rows, None].to(x_RD.dtype),
                gate_RF=gate_RF[rows],
                up_RF=_at(up_RF, rows),
                grad_out_RD=grads[0][rows],
                stack_of=dict(zip(_STACKS, stacks, strict=True)),
                grad_of=grad_of,
                grad_x_RD=_at(grad_x_RD, rows),
                grad_weight_R=_at(grad_weights_R, rows),
            )
        return (grad_x_RD, grad_weights_R, None, None, *(grad_of[name] for name in _STACKS))


# Stacked parameters in the order of _GroupedFFN's arguments
_STACKS = ("w1", "w2", "w3", "b1", "b2", "b3")


def _at(stack: Tensor | None, index: int | slice) -> Tensor | None:
    return None if stack is None else stack[index]


def _row_slices(counts: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


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


def _expert_backward(
    *,
    expert: int,
    act: Activation,
    x_RD: Tensor,
    weight_R1: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor | None,
    grad_out_RD: Tensor,
    stack_of: dict[str, Tensor | None],
    grad_of: dict[str, Tensor | None],
    grad_x_RD: Tensor | None,
    grad_weight_R: Tensor | None,
) -> None:
    """Gradients of one expert's rows, written into the tensors handed in.

    Inner gradients are those of the output before its weight; the weight comes in with x_RD and grad_out_RD.
    """
    w1, w2, w3, b2 = (_at(stack_of[name], expert) for name in ("w1", "w2", "w3", "b2"))
    assert w1 is not None and w2 is not None
    with torch.enable_grad():
        gate_leaf = gate_RF.detach().requires_grad_()
        activated = act(gate_leaf)
    hidden_RF = activated.detach() if up_RF is None else activated.detach() * up_RF
    weighted_grad_RD = grad_out_RD * weight_R1
    weighted_x_RD = x_RD * weight_R1

    grad_hidden_RF = grad_out_RD @ w2
    if grad_weight_R is not None:
        torch.sum(hidden_RF * grad_hidden_RF, dim=-1, dtype=grad_weight_R.dtype, out=grad_weight_R)
        if b2 is not None:
            grad_weight_R += grad_out_RD.to(grad_weight_R.dtype) @ b2.to(grad_weight_R.dtype)
    _outer(weighted_grad_RD, hidden_RF, grad_of["w2"], expert)
    if (grad_b2 := grad_of["b2"]) is not None:
        grad_b2[expert] = weighted_grad_RD.sum(dim=0)

    grad_activated_RF = grad_hidden_RF if up_RF is None else grad_hidden_RF * up_RF
    (grad_gate_RF,) = torch.autograd.grad(activated, gate_leaf, grad_activated_RF)
    _outer(grad_gate_RF, weighted_x_RD, grad_of["w1"], expert)
    _outer(grad_gate_RF, weight_R1, grad_of["b1"], expert)
    if grad_x_RD is not None:
        torch.mm(grad_gate_RF, w1, out=grad_x_RD)
    if w3 is not None:
        grad_up_RF = grad_hidden_RF.mul_(activated.detach())
        _outer(grad_up_RF, weighted_x_RD, grad_of["w3"], expert)
        _outer(grad_up_RF, weight_R1, grad_of["b3"], expert)
        if grad_x_RD is not None:
            grad_x_RD.addmm_(grad_up_RF, w3)
    if grad_x_RD is not None:
        grad_x_RD *= weight_R1


def _outer(grad_RA: Tensor, x_RB: Tensor, grad_stack: Tensor | None, expert: int) -> None:
    """grad^T x into one expert's gradient [A, B], or [A] where B is 1."""
    if grad_stack is not None:
        torch.mm(grad_RA.t(), x_RB, out=grad_stack[expert].view(grad_RA.shape[1], x_RB.shape[1]))
