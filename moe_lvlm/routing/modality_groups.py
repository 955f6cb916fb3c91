"""Experts in two groups, one for each modality (LTDR table 11).

T tokens   E experts
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lvlm.config.moe import ModalityGroupRouterSettings
from moe_lvlm.routing.top_k import TopKRouter
from moe_lvlm.routing.types import Modality, RoutingContext


class ModalityGroupRouter(TopKRouter):
    """Vision tokens choose among the first `vision_experts` experts, language tokens among the others (LTDR appendix
    B.1). Probabilities are a softmax within the token's group, and 0 outside."""

    settings: ModalityGroupRouterSettings

    def mask_scores(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        is_vision_T1 = (context.modality_T == Modality.VISION)[:, None]
        is_for_vision_E = torch.arange(self.num_experts, device=logits_TE.device) < self.settings.vision_experts
        return logits_TE.masked_fill(is_vision_T1 != is_for_vision_E, -torch.inf)
