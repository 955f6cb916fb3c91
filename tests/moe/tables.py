"""Routing decisions made by hand, for tests of what executes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lvlm.moe.dispatch import Dispatcher
from moe_lvlm.moe.experts import Experts
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


def run_layer(dispatcher: Dispatcher, experts: Experts, x_TD: Tensor, decision: RoutingDecision) -> Tensor:
    """Dispatch, experts, combine."""
    rows, route = dispatcher.dispatch(x_TD, decision)
    return dispatcher.combine(experts(rows), route)
