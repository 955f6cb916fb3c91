"""From a router's settings to the router."""

from __future__ import annotations

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.ltdr import LongTailRouter
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.top_k import TopKRouter

ROUTERS: dict[str, type[Router]] = {"top_k": TopKRouter, "ltdr": LongTailRouter}


def build_router(*, model_width: int, config: MoEConfig) -> Router:
    """The router that `config.router` names."""
    return ROUTERS[config.router.kind](model_width=model_width, config=config)
