"""What all token-choice routers share: the gate, the stable choice of the best experts, the weights of the chosen.

T tokens   D model width   E experts   K slots a token
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lvlm.config.moe import MoEConfig, RouterSettings
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision


class Gate(nn.Linear):
    """A linear layer in float32, whatever its weight's type. A module of its own call, so that ZeRO-3 gathers it."""

    def __init__(self, model_width: int, num_experts: int) -> None:
        super().__init__(model_width, num_experts, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return _Float32Linear.apply(input, self.weight)


class _Float32Linear(torch.autograd.Function):
    """x w^T in float32, keeping x in its own type for the backward pass rather than a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        with torch.autocast(x_TD.device.type, enabled=False):
            return nn.functional.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD = (grads[0] @ weight_ED.float()).to(x_TD.dtype) if ctx.needs_input_grad[0] else None
        grad_weight_ED = (grads[0].t() @ x_TD.float()).to(weight_ED.dtype) if ctx.needs_input_grad[1] else None
        return grad_x_TD, grad_weight_ED


class Router(nn.Module, ABC):
    """Decides which experts take which token: (x_TD, context) -> RoutingDecision.

    Scores are float32 throughout: in bf16 two experts tie far too often for a stable choice. Padding takes no expert.
    """

    def __init__(self, *, model_width: int, config: MoEConfig) -> None:
        super().__init__()
        self.gate = Gate(model_width, config.num_experts)
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.settings: RouterSettings = config.router
        # The identity on one process; parallel/ hands in a sum over the data-parallel ranks.
        self.sum_over_ranks: Callable[[Tensor], Tensor] = _identity
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the gate anew: N(0, 0.02), or torch's initialisation of a linear layer (`init: linear`)."""
        if self.settings.init == "normal":
            nn.init.normal_(self.gate.weight, std=0.02)
        else:
            self.gate.reset_parameters()

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """K: the most experts that one token can use."""

    @abstractmethod
    def count_experts(self, probs_TE: Tensor, context: RoutingContext) -> Tensor:
        """Int64 [T]: how many experts each token uses; what it says of padding is not read."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.gate(x_TD)
        probs_TE = logits_TE.softmax(dim=-1)
        # A stable sort, not topk: equal scores go to the lowest index on every device.
        sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
        expert_ids_TK = order_TE[:, : self.num_slots]

        num_experts_T = self.count_experts(probs_TE.detach(), context)
        is_token_T1 = (context.modality_T != Modality.PADDING)[:, None]
        keep_TK = torch.arange(self.num_slots, device=x_TD.device) < num_experts_T[:, None]
        keep_TK = keep_TK & is_token_T1
        weights_TK = combine_weights(
            sorted_TE[:, : self.num_slots],
            keep_TK,
            renormalize=self.settings.renormalize,
            straight_through=self.settings.top1_weight == "straight_through",
        )
        return RoutingDecision(logits_TE, probs_TE, expert_ids_TK, weights_TK, keep_TK)


def combine_weights(probs_TK: Tensor, keep_TK: Tensor, *, renormalize: bool, straight_through: bool) -> Tensor:
    """Weights of the chosen experts [T, K], 0 where a slot is not kept.

    renormalize: probabilities over the sum of the kept ones, so that equal experts compute what one of them does; not
        LTDR eq. 7, which takes them as they are.
    straight_through: with one expert the renormalised weight would be the constant 1, and the router would learn
        nothing from the task; it is then P / stop_gradient(P). Otherwise it is the raw P.
    """
    kept_TK = probs_TK * keep_TK
    if not renormalize:
        return kept_TK
    weights_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(kept_TK.dtype).tiny)
    has_one_T1 = keep_TK.sum(dim=-1, keepdim=True) == 1
    floor = torch.finfo(kept_TK.dtype).tiny
    single_TK = kept_TK / kept_TK.detach().clamp_min(floor) if straight_through else kept_TK
    return torch.where(has_one_T1, single_TK, weights_TK)


def _identity(x: Tensor) -> Tensor:
    return x
