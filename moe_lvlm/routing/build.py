"""From a router's settings to the router."""

from __future__ import annotations

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.cluster import ClusterRouter
from moe_lvlm.routing.dynamic import DynamicRouter
from moe_lvlm.routing.instruct import InstructRouter
from moe_lvlm.routing.ltdr import LongTailRouter
from moe_lvlm.routing.modality_groups import ModalityGroupRouter
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.stgc import ConflictRouter
from moe_lvlm.routing.task import TaskRouter
from moe_lvlm.routing.top_k import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "ltdr": LongTailRouter,
    "task": TaskRouter,
    "cluster": ClusterRouter,
    "instruct": InstructRouter,
    "modality_groups": ModalityGroupRouter,
    "dynamic": DynamicRouter,
    "stgc": ConflictRouter,
}


def build_router(*, model_width: int, config: MoEConfig) -> Router:
    """The router that `config.router` names."""
    return ROUTERS[config.router.kind](model_width=model_width, config=config)
