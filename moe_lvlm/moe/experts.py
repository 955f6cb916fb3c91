"""The experts of one layer: stacked FFNs, and the computation of rows sorted by expert.

E experts held here   D model width   F FFN width   R routed rows   G groups of rows   A rows of all groups
I inputs, O outputs of a linear layer
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_lvlm.moe.conflict import ProbedFFN
from moe_lvlm.moe.grouped import (
    Activation,
    BackwardOutputs,
    Hidden,
    Stacks,
    backward_rows,
    forward_rows,
    row_slices,
    sum_products,
)
from moe_lvlm.moe.types import ExpertAdapters, ExpertRows


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

    def forward(self, rows: ExpertRows, adapters: ExpertAdapters | None = None) -> Tensor:
        """Weighted outputs [R, D] of rows sorted by expert; `rows.counts` has one number an expert held here.

        Rows with a probe get the cosines of their gradients by way of it (see `ExpertRows`).

        adapters: on the stacked matrices, of a layer whose router asks for no cosines.

        Raises:
            ValueError: counts for another number of experts.
        """
        if len(rows.counts) != self.w1.shape[0]:
            raise ValueError(f"{len(rows.counts)} row counts for {self.w1.shape[0]} experts")
        if adapters is not None:
            return self._forward_adapted(rows, adapters)
        stacks = (self.w1, self.w2, self.w3, self.b1, self.b2, self.b3)
        # The weights' own type decides, also under autocast, which knows nothing of results written in place.
        with torch.autocast(rows.x_RD.device.type, enabled=False):
            x_RD = rows.x_RD.to(self.w1.dtype)
            if rows.probe_R is not None and rows.probe_R.requires_grad:
                parts = rows.counts_by_source or tuple((count,) for count in rows.counts)
                return ProbedFFN.apply(x_RD, rows.weights_R, rows.probe_R, parts, self.act, *stacks)
            return _GroupedFFN.apply(x_RD, rows.weights_R, rows.counts, self.act, *stacks)

    def _forward_adapted(self, rows: ExpertRows, adapters: ExpertAdapters) -> Tensor:
        """The same step by step, with what the adapters add to each product. Keeps up to four numbers a row and hidden
        unit where `_GroupedFFN` keeps two."""
        assert rows.probe_R is None or not rows.probe_R.requires_grad, "attach refuses routers that ask for cosines"
        with torch.autocast(rows.x_RD.device.type, enabled=False):
            x_RD = rows.x_RD.to(self.w1.dtype)
            product_RF = multiply_rows(x_RD, self.w1, self.b1, counts=rows.counts)
            hidden_RF = self.act(adapters.add("w1", product_RF, x_RD, rows))
            if self.w3 is not None:
                product_RF = multiply_rows(x_RD, self.w3, self.b3, counts=rows.counts)
                hidden_RF = hidden_RF * adapters.add("w3", product_RF, x_RD, rows)
            product_RD = multiply_rows(hidden_RF, self.w2, self.b2, counts=rows.counts)
            out_RD = adapters.add("w2", product_RD, hidden_RF, rows)
            return out_RD * rows.weights_R[:, None].to(out_RD.dtype)


def multiply_rows(
    x_RI: Tensor,
    stack: Tensor,
    bias_GO: Tensor | None = None,
    *,
    counts: tuple[int, ...],
    row_A: Tensor | None = None,
) -> Tensor:
    """Products [A, O] of rows with the matrix of their group, plus its bias; a tensor of its own, no view.

    stack: [..., O, I], G matrices. counts: rows of each group, which stand one after the other. row_A: int64, which row
    of x each of them is, no row twice in a group; None where they are the rows of x in their order.
    """
    return _GroupedProduct.apply(x_RI, row_A, stack, bias_GO, counts)


class _GroupedProduct(torch.autograd.Function):
    """Group by group; gathered rows are gathered again in the backward pass, and parameters are saved whole as above.
    Frozen matrices, as those beside a LoRA are, need no rows for their gradient, and none are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        row_A: Tensor | None,
        stack: Tensor,
        bias_GO: Tensor | None,
        counts: tuple[int, ...],
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x_RI if needs[2] else None, row_A, stack)
        ctx.counts, ctx.num_rows = counts, x_RI.shape[0]
        ctx.bias_shape = None if bias_GO is None else bias_GO.shape
        matrices_GOI = stack.reshape(-1, *stack.shape[-2:])
        out_AO = x_RI.new_empty(sum(counts), stack.shape[-2])
        for group, rows in row_slices(counts):
            x_AI = x_RI[rows if row_A is None else row_A[rows]]
            if bias_GO is None:
                torch.mm(x_AI, matrices_GOI[group].t(), out=out_AO[rows])
            else:
                torch.addmm(bias_GO[group], x_AI, matrices_GOI[group].t(), out=out_AO[rows])
        return out_AO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, row_A, stack = ctx.saved_tensors
        grad_AO, needs = grads[0], ctx.needs_input_grad
        matrices_GOI = stack.reshape(-1, *stack.shape[-2:])
        # Groups without a row must still give a gradient (of 0): every rank reduces the same buckets.
        grad_x_RI = grad_AO.new_zeros(ctx.num_rows, stack.shape[-1]) if needs[0] else None
        grad_stack_GOI = torch.zeros_like(matrices_GOI) if needs[2] else None
        grad_bias_GO = grad_AO.new_zeros(ctx.bias_shape) if needs[3] else None
        for group, rows in row_slices(ctx.counts):
            if grad_x_RI is not None and row_A is None:
                torch.mm(grad_AO[rows], matrices_GOI[group], out=grad_x_RI[rows])
            elif grad_x_RI is not None:
                grad_x_RI.index_add_(0, row_A[rows], grad_AO[rows] @ matrices_GOI[group])
            if grad_stack_GOI is not None:
                x_AI = x_RI[rows if row_A is None else row_A[rows]]
                sum_products(grad_AO[rows], x_AI, out=grad_stack_GOI[group])
            if grad_bias_GO is not None:
                sum_products(grad_AO[rows], None, out=grad_bias_GO[group])
        grad_stack = None if grad_stack_GOI is None else grad_stack_GOI.view(stack.shape)
        return grad_x_RI, None, grad_stack, grad_bias_GO, None


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
        *stacks: Any,
    ) -> Tensor:
        out_RD, hidden = forward_rows(x_RD, weights_R, counts, act, Stacks(*stacks))
        ctx.counts, ctx.act = counts, act
        ctx.save_for_backward(x_RD, weights_R, *hidden, *stacks)
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weights_R, gate_RF, up_RF, *saved = ctx.saved_tensors
        stacks = Stacks(*saved)
        needs = ctx.needs_input_grad
        outputs = BackwardOutputs.allocate(x_RD, weights_R, stacks, ctx.counts, (*needs[:2], *needs[4:]))
        for expert, rows in row_slices(ctx.counts):
            backward_rows(
                rows,
                expert,
                x_RD=x_RD,
                weights_R=weights_R,
                hidden=Hidden(gate_RF, up_RF),
                grad_out_RD=grads[0],
                act=ctx.act,
                stacks=stacks,
                outputs=outputs,
                take=outputs.taker(expert),
            )
        return (outputs.x_RD, outputs.weights_R, None, None, *outputs.in_order())
