"""How many parameters a model has, and how many of them a token passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_lvlm.checkpoint.source import WeightSource
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.eea import has_eea


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Parameters of the whole model, and those that one token passes at most: with `max_experts_per_token` experts,
    and with `tail_k`, None where no token takes more."""

    total: int
    activated: int
    activated_tail: int | None = None


def count_parameters(source: WeightSource, moe: MoEConfig | None) -> ParameterCounts:
    """All parameters, and those that a token passes."""
    sizes = {name: torch.Size(source.shape(name)).numel() for name in source.names()}
    total = sum(sizes.values())
    if moe is None:
        return ParameterCounts(total=total, activated=total)
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)

    def activated(num_experts: int) -> int:
        return total - routed + routed * num_experts // moe.num_experts

    tail = getattr(moe.router, "tail_k", None) or moe.num_experts
    return ParameterCounts(
        total=total,
        activated=activated(moe.max_experts_per_token),
        activated_tail=activated(tail) if has_eea(moe) else None,
    )
