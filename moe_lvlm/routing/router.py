"""What routers share: scores, the stable choice of the best experts, capacity, the weights of the chosen.

T tokens   D model width   E experts   R routed rows (tokens or samples)   K slots a row   N samples
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_lvlm.config.moe import MoEConfig, RouterSettings
from moe_lvlm.routing.capacity import drop_over_capacity, expert_capacity
from moe_lvlm.routing.gates import build_gate
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision


class Router(nn.Module, ABC):
    """Decides which experts take which token: (x_TD, context) -> RoutingDecision.

    Scores are float32 throughout: in bf16 two experts tie far too often for a stable choice. Padding takes no expert.
    """

    # Whether the layer at hand must tell how much the instruction attends to each token (`RoutingContext.attention_BS`).
    needs_attention = False

    def __init__(self, *, model_width: int, config: MoEConfig) -> None:
        super().__init__()
        self.model_width = model_width
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.settings: RouterSettings = config.router
        self.capacity_factor = config.capacity_factor
        self.eval_capacity_factor = config.eval_capacity_factor
        # The identity on one process; parallel/ hands in a sum over the data-parallel ranks.
        self.sum_over_ranks: Callable[[Tensor], Tensor] = _identity

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters anew from torch's generator."""

    @property
    def num_slots(self) -> int:
        """K: the most experts that one token can use."""
        return self.top_k

    @abstractmethod
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """x_TD: hidden states of all tokens, as the experts get them. context: facts about the same tokens."""


class GatedRouter(Router):
    """A router whose probabilities are the softmax of a gate's scores (LTDR eq. 6)."""

    def __init__(self, *, model_width: int, config: MoEConfig) -> None:
        super().__init__(model_width=model_width, config=config)
        self.gate = build_gate(self.gate_width, config.num_experts, config.router)

    @property
    def gate_width(self) -> int:
        """Width of what the gate reads."""
        return self.model_width

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()

    def rank_experts(self, logits_RE: Tensor, probs_RE: Tensor, *, is_masked: bool = False) -> tuple[Tensor, Tensor]:
        """The K best experts of each row and their probabilities, both [R, K], best first.

        logits_RE: -inf where an expert may not be chosen, if `is_masked`. With `second_choice_noise: gumbel` the second
        expert is drawn, in training, from the softmax over all but the first.
        """
        rank_RE = probs_RE.detach()
        if is_masked:  # below every probability, also one that has underflowed to 0
            rank_RE = rank_RE.masked_fill(logits_RE == -torch.inf, -1.0)
        if self.training and self.settings.second_choice_noise == "gumbel":
            first_R1 = rank_RE.sort(dim=-1, descending=True, stable=True).indices[:, :1]
            gumbel_RE = -torch.empty_like(logits_RE).exponential_().log()
            second_R1 = (logits_RE.detach() + gumbel_RE).scatter(1, first_R1, -torch.inf).argmax(dim=-1, keepdim=True)
            rank_RE = rank_RE.scatter(1, second_R1, 2.0).scatter(1, first_R1, 3.0)
        # A stable sort, not topk: equal scores go to the lowest index on every device.
        order_RE = rank_RE.sort(dim=-1, descending=True, stable=True).indices
        expert_ids_RK = order_RE[:, : self.num_slots]
        return expert_ids_RK, probs_RE.gather(1, expert_ids_RK)

    def weigh(self, probs_RK: Tensor, chosen_RK: Tensor, keep_RK: Tensor, *, fewest: int) -> Tensor:
        """Weights of the chosen experts, as the settings say. fewest: that a row has chosen, if it has any."""
        return combine_weights(
            probs_RK,
            keep_RK,
            chosen_TK=chosen_RK,
            fewest=fewest,
            renormalize=self.settings.renormalize,
            straight_through=self.settings.top1_weight == "straight_through",
        )


class TokenRouter(GatedRouter):
    """Decides for each token by itself."""

    @property
    def fewest_experts(self) -> int:
        """The least that `count_experts` says of a token."""
        return self.top_k

    @abstractmethod
    def count_experts(self, probs_TE: Tensor, context: RoutingContext) -> Tensor:
        """Int64 [T]: how many experts each token uses; what it says of padding is not read."""

    def mask_scores(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """The scores with -inf where a token may not choose an expert."""
        return logits_TE

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.gate(x_TD)
        masked_TE = self.mask_scores(logits_TE, context)
        probs_TE = masked_TE.softmax(dim=-1)
        expert_ids_TK, sorted_TK = self.rank_experts(masked_TE, probs_TE, is_masked=masked_TE is not logits_TE)
        fewest = self.fewest_experts
        fills_slots = fewest == self.num_slots
        chosen_TK = (context.modality_T != Modality.PADDING)[:, None].expand(-1, self.num_slots)
        if not fills_slots:
            num_experts_T = self.count_experts(probs_TE.detach(), context)
            chosen_TK = chosen_TK & (torch.arange(self.num_slots, device=x_TD.device) < num_experts_T[:, None])
        keep_TK, dropped_TK = chosen_TK, None
        if self.capacity_factor is not None:
            factor = self.capacity_factor if self.training else self.eval_capacity_factor
            capacity = expert_capacity(x_TD.shape[0], self.num_experts, top_k=self.top_k, factor=factor)
            keep_TK = drop_over_capacity(expert_ids_TK, chosen_TK, num_experts=self.num_experts, capacity=capacity)
            dropped_TK = chosen_TK & ~keep_TK
        weights_TK = self.weigh(sorted_TK, chosen_TK, keep_TK, fewest=fewest)
        return RoutingDecision(
            logits_TE,
            probs_TE,
            expert_ids_TK,
            weights_TK,
            keep_TK,
            dropped_RK=dropped_TK,
            fills_slots=fills_slots and self.capacity_factor is None,
        )


class SampleRouter(GatedRouter):
    """Decides once for all tokens of a sample."""

    @abstractmethod
    def describe_samples(self, x_TD: Tensor, context: RoutingContext, num_samples: int) -> Tensor:
        """What the gate reads of each sample, [num_samples, gate width].

        Without any sample one row of whatever kind: every rank must call the same modules.

        Raises:
            ValueError: the context does not hold what the decision rests on.
        """

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        num_samples = context.count_samples()
        logits_NE = self.gate(self.describe_samples(x_TD, context, num_samples))
        probs_NE = logits_NE.softmax(dim=-1)
        expert_ids_NK, sorted_NK = self.rank_experts(logits_NE, probs_NE)
        keep_NK = torch.full_like(expert_ids_NK, num_samples > 0, dtype=torch.bool)
        weights_NK = self.weigh(sorted_NK, keep_NK, keep_NK, fewest=self.num_slots)
        return RoutingDecision(
            logits_NE, probs_NE, expert_ids_NK, weights_NK, keep_NK, level="sample", fills_slots=True
        )


def combine_weights(
    probs_TK: Tensor,
    keep_TK: Tensor,
    *,
    chosen_TK: Tensor | None = None,
    fewest: int = 1,
    renormalize: bool,
    straight_through: bool,
) -> Tensor:
    """Weights of the chosen experts [T, K], 0 where a slot is not kept.

    chosen_TK: slots before any was dropped for want of capacity; None says that none was. fewest: experts that a token
        has chosen, if it has any; from 2 on no token is looked at for whether it has a single one.
    renormalize: probabilities over the sum of the kept ones, so that equal experts compute what one of them does; not
        LTDR eq. 7, which takes them as they are.
    straight_through: with one expert the renormalised weight would be the constant 1, and the router would learn
        nothing from the task; it is then P / stop_gradient(P). Otherwise it is the raw P.
    """
    kept_TK = probs_TK * keep_TK
    if not renormalize:
        return kept_TK
    floor = torch.finfo(kept_TK.dtype).tiny
    weights_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True).clamp_min(floor)
    if fewest > 1:
        return weights_TK
    has_one_T1 = (keep_TK if chosen_TK is None else chosen_TK).sum(dim=-1, keepdim=True) == 1
    single_TK = kept_TK / kept_TK.detach().clamp_min(floor) if straight_through else kept_TK
    return torch.where(has_one_T1, single_TK, weights_TK)


def _identity(x: Tensor) -> Tensor:
    return x
