"""Routing traces of a connector with experts, made of the paths that images take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision, Site

LAYERS = (2, 3, 5)


def connector_trace(
    paths: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] = LAYERS,
    num_experts: int = 3,
    keep: Sequence[bool] | None = None,
    tokens: int = 2,
) -> RoutingTrace:
    """A batch of samples with an image each and a word; layers recorded from the top, which no reader may rely on."""
    num_images = len(paths)
    image = torch.arange(num_images, dtype=torch.int32)[:, None]
    word = torch.full((num_images, 1), -1, dtype=torch.int32)
    context = RoutingContext(
        modality_BS=torch.tensor([[int(Modality.VISION)] * tokens + [int(Modality.LANGUAGE)]] * num_images).to(
            torch.int8
        ),
        image_BS=torch.cat([image.expand(-1, tokens), word], dim=1),
        sample_BS=image.expand(-1, tokens + 1),
    )
    trace = RoutingTrace(context)
    keep_R1 = torch.tensor(keep if keep is not None else [True] * num_images)[:, None]
    for place in reversed(range(len(layers))):
        ids_R1 = torch.tensor([path[place] for path in paths])[:, None]
        probs_RE = torch.full((num_images, num_experts), 0.1).scatter(1, ids_R1, 0.8)
        decision = RoutingDecision(probs_RE.log(), probs_RE, ids_R1, probs_RE.gather(1, ids_R1), keep_R1, "image")
        trace.record(Site("connector", layers[place]), decision)
    return trace
