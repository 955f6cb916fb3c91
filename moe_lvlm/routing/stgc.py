"""LTDR's STGC: tokens whose gradients conflict with an expert's are moved away from it (Yang et al., arXiv 2406.19905).

T tokens   E experts   K slots a token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_lvlm.config.moe import ConflictRouterSettings, MoEConfig
from moe_lvlm.routing.top_k import TopKRouter
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision


class ConflictRouter(TopKRouter):
    """Top-k whose scores learn, by a conflict elimination loss, to leave experts where a token is in conflict.

    A token is in conflict at an expert that it uses where the cosine between its gradient on the expert's parameters
    and the expert's mean gradient over the micro-batch is below a threshold. The loss is cross entropy between the
    expert and the softmax of the negated scores, -log softmax(-z)_i (STGC eq. 8, z' = -z), which lowers z_i: summed
    over the assignments in conflict, divided by the micro-batch's tokens, times a coefficient, a layer.

    Conflicts are known in the backward pass only. The loss therefore has its gradient, and the value 0: it comes as
    the decision's `penalty`, and the conflicts as `conflict_RK`. Outside training this is plain top-k.

    From the STGC paper are the cosine, the mean gradient and the form of the loss. Ours, for want of its text and code:
    the threshold and the coefficient; the division by all tokens; every MoE layer from the first step on; gradients of
    the whole training loss that reach the layer rather than of the language-model loss alone, in one backward pass;
    and all parameters of the expert, exactly, at the weight with which the token used it.
    """

    def __init__(self, *, model_width: int, config: MoEConfig) -> None:
        super().__init__(model_width=model_width, config=config)
        assert isinstance(config.router, ConflictRouterSettings)
        self.threshold = config.router.threshold
        self.coefficient = config.router.coefficient

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = super().forward(x_TD, context)
        if not self.training or not torch.is_grad_enabled():
            return decision
        stay_TK = (-decision.logits_RE).log_softmax(dim=-1).gather(1, decision.expert_ids_RK)
        conflict_TK = torch.zeros_like(decision.keep_RK)
        probe_TK, loss = _ConflictLoss.apply(stay_TK, decision.keep_RK, conflict_TK, self.threshold)
        num_tokens = (context.modality_T != Modality.PADDING).sum().clamp_min(1)
        return decision._replace(
            penalty=self.coefficient * loss / num_tokens, probe_RK=probe_TK, conflict_RK=conflict_TK
        )


class _ConflictLoss(torch.autograd.Function):
    """Minus the sum of stay_TK over the assignments in conflict, in its gradient; zeros in the forward pass.

    Two outputs: a probe [T, K], as whose gradient the cosines come back from the experts, and the loss, a scalar. Both
    gradients meet here. Writes what it finds into conflict_TK.
    """

    @staticmethod
    def forward(
        ctx: Any, stay_TK: Tensor, keep_TK: Tensor, conflict_TK: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(keep_TK)
        # Not saved: checkpointing would hand back the copy that its recompute makes.
        ctx.conflict_TK, ctx.threshold = conflict_TK, threshold
        # Zeros for want of a gradient would be read as cosines.
        ctx.set_materialize_grads(False)
        return torch.zeros_like(stay_TK), stay_TK.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cosine_TK, grad_loss = grads
        if cosine_TK is None:
            return None, None, None, None
        (keep_TK,) = ctx.saved_tensors
        conflict_TK = keep_TK & (cosine_TK < ctx.threshold)
        ctx.conflict_TK.copy_(conflict_TK)
        return None if grad_loss is None else -grad_loss * conflict_TK, None, None, None
