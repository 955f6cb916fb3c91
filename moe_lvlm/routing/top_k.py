"""Plain top-k routing."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lvlm.routing.router import TokenRouter
from moe_lvlm.routing.types import RoutingContext


class TopKRouter(TokenRouter):
    """Every token uses its `top_k` best experts (LTDR eq. 6, 7; MoE-LLaVA)."""

    def count_experts(self, probs_TE: Tensor, context: RoutingContext) -> Tensor:
        return torch.full((probs_TE.shape[0],), self.top_k, device=probs_TE.device)
