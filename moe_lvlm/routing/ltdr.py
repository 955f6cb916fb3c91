"""LTDR's router: vision tokens with a long-tailed distribution of routing probabilities use more experts.

T tokens   E experts   I images
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_lvlm.config.moe import LongTailRouterSettings, MoEConfig
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.types import Modality, RoutingContext


class LongTailRouter(Router):
    """Top-k routing in which vision tail tokens use their `tail_k` best experts (EEA: LTDR eq. 9, 11, 12).

    Departs from eq. 12 where `renormalize` is on: weights are renormalised over the experts chosen, so that experts
    copied from a dense FFN compute what the dense FFN did.
    """

    settings: LongTailRouterSettings

    def __init__(self, *, model_width: int, config: MoEConfig) -> None:
        super().__init__(model_width=model_width, config=config)
        self.tail_k = self.settings.tail_k or config.num_experts

    @property
    def num_slots(self) -> int:
        return self.top_k if self.settings.eea_select == "none" else max(self.top_k, self.tail_k)

    def count_experts(self, probs_TE: Tensor, context: RoutingContext) -> Tensor:
        if self.settings.eea_select == "none":
            return torch.full((probs_TE.shape[0],), self.top_k, device=probs_TE.device)
        scope = self.settings.tail_scope if self.training else self.settings.eval_tail_scope
        is_tail_T = vision_tail(probs_TE, context, scope=scope, sum_over_ranks=self.sum_over_ranks)
        return torch.where(is_tail_T, self.tail_k, self.top_k)


def routing_probability_variance(probs_TE: Tensor) -> Tensor:
    """RPV, float32 [T]: the population variance of a token's probabilities over all experts (LTDR eq. 9)."""
    return probs_TE.detach().float().var(dim=-1, unbiased=False)


def vision_tail(
    probs_TE: Tensor,
    context: RoutingContext,
    *,
    scope: str,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Bool [T]: vision tokens whose RPV is above the mean RPV of the tokens they are compared with (LTDR eq. 11).

    scope: compared with all vision tokens of the batch (`batch`), of their own image (`image`), or of all ranks
        (`global`: sums and counts pass through `sum_over_ranks`, a collective on every rank).
    """
    is_vision_T = context.modality_T == Modality.VISION
    # Sums in float64: the mean of equal variances must not round below them, or all would be tail.
    rpv_T = routing_probability_variance(probs_TE).double()
    if scope == "image":
        image_T = torch.where(is_vision_T, context.image_T, 0).long()
        num_images = probs_TE.shape[0]  # an upper bound, known without a look at the data
        sum_I = rpv_T.new_zeros(num_images).index_add(0, image_T, rpv_T * is_vision_T)
        count_I = rpv_T.new_zeros(num_images).index_add(0, image_T, is_vision_T.double())
        mean_T = (sum_I / count_I.clamp_min(1))[image_T]
    elif scope in ("batch", "global"):
        totals_2 = torch.stack(((rpv_T * is_vision_T).sum(), is_vision_T.sum().double()))
        if scope == "global":
            totals_2 = sum_over_ranks(totals_2)
        mean_T = totals_2[0] / totals_2[1].clamp_min(1)
    else:
        raise ValueError(f"tail scope: {scope!r}; allowed: batch, image, global")
    return is_vision_T & (rpv_T > mean_T)
