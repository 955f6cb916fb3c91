"""LTDR's router: vision tokens with a long-tailed distribution of routing probabilities use more experts.

T tokens   E experts   I images
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_lvlm.config.moe import LongTailRouterSettings, MoEConfig
from moe_lvlm.routing.router import TokenRouter
from moe_lvlm.routing.types import Modality, RoutingContext


class LongTailRouter(TokenRouter):
    """Top-k routing in which vision tail tokens use their `tail_k` best experts (EEA: LTDR eq. 9, 11, 12), or another
    choice of vision tokens does (LTDR table 7).

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

    @property
    def fewest_experts(self) -> int:
        return self.top_k if self.settings.eea_select == "none" else min(self.top_k, self.tail_k)

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        return self.settings.eea_select == "instruction_aware"

    def count_experts(self, probs_TE: Tensor, context: RoutingContext) -> Tensor:
        if self.settings.eea_select == "none":
            return torch.full((probs_TE.shape[0],), self.top_k, device=probs_TE.device)
        return torch.where(self._is_selected(probs_TE, context), self.tail_k, self.top_k)

    def _is_selected(self, probs_TE: Tensor, context: RoutingContext) -> Tensor:
        """Bool [T]: the vision tokens that use more experts."""
        if self.settings.eea_select == "instruction_aware":
            return instruction_tokens(context, share=self.settings.instruction_share)
        scope = self.settings.tail_scope if self.training else self.settings.eval_tail_scope
        is_tail_T = vision_tail(probs_TE, context, scope=scope, sum_over_ranks=self.sum_over_ranks)
        if self.settings.eea_select == "vision_head":
            return (context.modality_T == Modality.VISION) & ~is_tail_T
        return is_tail_T


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


def instruction_tokens(context: RoutingContext, *, share: float) -> Tensor:
    """Bool [T]: of each image with M tokens the ceil(share x M) to which the instruction attends most (IAT, LTDR table
    7: 15 %); of equal ones the first.

    Raises:
        ValueError: the layer did not tell how much the instruction attends to each token.
    """
    if context.attention_BS is None:
        raise ValueError(
            "eea_select: instruction_aware needs the attention of the layer's instruction tokens; it is known inside a "
            "decoder layer under model.attention: eager"
        )
    is_vision_T = context.modality_T == Modality.VISION
    num_tokens = is_vision_T.shape[0]
    # Everything else counts as one more image, the last
    image_T = torch.where(is_vision_T, context.image_T, num_tokens).long()
    by_attention_T = context.attention_BS.flatten().sort(descending=True, stable=True).indices
    order_T = by_attention_T[image_T[by_attention_T].sort(stable=True).indices]
    count_I = torch.bincount(image_T, minlength=num_tokens + 1)
    first_I = count_I.cumsum(0) - count_I
    rank_T = torch.empty_like(order_T)
    rank_T[order_T] = torch.arange(num_tokens, device=order_T.device)
    rank_T -= first_I[image_T]
    # 0.07 x 100 is a little more than 7 in floating point
    quota_I = (count_I.double() * share - 1e-9).ceil()
    return is_vision_T & (rank_T < quota_I[image_T])
