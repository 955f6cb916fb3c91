"""The experts of one layer: stacked FFNs, and the computation of rows sorted by expert.

E experts held here   D model width   F FFN width   R routed rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_lvlm.moe.conflict import ProbedFFN
from moe_lvlm.moe.grouped import Activation, BackwardOutputs, Hidden, Stacks, backward_rows, forward_rows, row_slices
from moe_lvlm.moe.types import ExpertRows


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
        """Weighted outputs [R, D] of rows sorted by expert; `rows.counts` has one number an expert held here.

        Rows with a probe get the cosines of their gradients by way of it (see `ExpertRows`).
        """
        if len(rows.counts) != self.w1.shape[0]:
            raise ValueError(f"{len(rows.counts)} row counts for {self.w1.shape[0]} experts")
        stacks = (self.w1, self.w2, self.w3, self.b1, self.b2, self.b3)
        # The weights' own type decides, also under autocast, which knows nothing of results written in place.
        with torch.autocast(rows.x_RD.device.type, enabled=False):
            x_RD = rows.x_RD.to(self.w1.dtype)
            if rows.probe_R is not None and rows.probe_R.requires_grad:
                parts = rows.counts_by_source or tuple((count,) for count in rows.counts)
                return ProbedFFN.apply(x_RD, rows.weights_R, rows.probe_R, parts, self.act, *stacks)
            return _GroupedFFN.apply(x_RD, rows.weights_R, rows.counts, self.act, *stacks)


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
