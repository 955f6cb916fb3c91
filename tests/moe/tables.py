"""Routing decisions made by hand, for tests of what executes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lvlm.moe.dispatch import Dispatcher
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.rows import RowPlan
from moe_lvlm.moe.types import ExpertRows
from moe_lvlm.routing.types import RoutingDecision


def decision_of(
    choices: Sequence[Sequence[int]], num_experts: int, *, num_slots: int = 3, seed: int = 0
) -> RoutingDecision:
    """The experts of each token, in their order; a token may have none. Random weights that sum to 1 a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(choices), num_slots, dtype=torch.int64)
    keep = torch.zeros(len(choices), num_slots, dtype=torch.bool)
    for token, chosen in enumerate(choices):
        ids[token, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
        keep[token, : len(chosen)] = True
    weights = torch.rand(ids.shape, generator=generator) * keep
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    probs = torch.full((len(choices), num_experts), 1 / num_experts)
    return RoutingDecision(probs.log(), probs, ids, weights, keep)


def random_experts(num_experts: int, *, width: int = 6, seed: int = 0) -> Experts:
    """Gated experts with biases, no two alike."""
    experts = Experts(num_experts=num_experts, model_width=width, ffn_width=4, activation="silu", has_bias=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


def sorted_rows(
    x_RD: Tensor,
    weights_R: Tensor,
    counts: tuple[int, ...],
    counts_by_source: tuple[tuple[int, ...], ...] | None = None,
    probe_R: Tensor | None = None,
) -> ExpertRows:
    """Rows that stand in the order of their experts, one slot each."""
    place_R = torch.arange(len(x_RD), dtype=torch.int32)
    plan = RowPlan(place_R, place_R[:, None], torch.tensor(counts).cumsum(0, dtype=torch.int32), counts)
    return ExpertRows(x_RD, plan, weights_R[:, None], counts_by_source, None if probe_R is None else probe_R[:, None])


def run_layer(dispatcher: Dispatcher, experts: Experts, x_TD: Tensor, decision: RoutingDecision) -> Tensor:
    """Dispatch, experts, combine."""
    dispatch = dispatcher.dispatch(x_TD, decision)
    return dispatch.combine(experts(dispatch.rows()))
