"""The record of routing decisions."""

from __future__ import annotations

from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Site
from tests.routing.tables import A, D, hidden_of, identity_router, language_context


def test_first_write_stays() -> None:
    trace = RoutingTrace(language_context(1))
    first = identity_router()(hidden_of(A), language_context(1))
    second = identity_router()(hidden_of(D), language_context(1))
    trace.record(Site("language_model", 0), first)
    trace.record(Site("language_model", 0), second)
    assert len(trace) == 1
    assert trace[Site("language_model", 0)] is first


def test_sites_keep_the_order_in_which_they_were_passed() -> None:
    trace = RoutingTrace(language_context(1))
    decision = identity_router()(hidden_of(A), language_context(1))
    sites = [Site("language_model", 2), Site("language_model", 0), Site("vision_tower", 2)]
    for site in sites:
        trace.record(site, decision)
    assert [site for site, _ in trace.items()] == sites


def test_detached_trace_is_outside_the_graph() -> None:
    trace = RoutingTrace(language_context(1))
    trace.record(Site("language_model", 0), identity_router()(hidden_of(A), language_context(1)))
    decision = trace.detach()[Site("language_model", 0)]
    assert not any(tensor.requires_grad for tensor in (decision.logits_RE, decision.probs_RE, decision.weights_RK))
    assert trace[Site("language_model", 0)].weights_RK.requires_grad
