"""Who goes to which expert: types, one file a router, losses."""

from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision, Site

__all__ = ["Modality", "Router", "RoutingContext", "RoutingDecision", "RoutingTrace", "Site", "build_router"]
