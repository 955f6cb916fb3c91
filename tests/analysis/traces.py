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


def adapter_trace(
    choices: Sequence[Sequence[tuple[int, float]]],
    *,
    linears: Sequence[tuple[str, int]] = (("self_attn.q_proj", 0), ("self_attn.v_proj", 0)),
    num_experts: int = 3,
    clusters: Sequence[int] | None = None,
    datasets: Sequence[int] | None = None,
    tokens: int = 2,
) -> RoutingTrace:
    """Samples of some words and a padding, each with the expert and the gate that it has at each adapted linear."""
    num_samples = len(choices)
    sample_N1 = torch.arange(num_samples, dtype=torch.int32)[:, None]
    padding = torch.full((num_samples, 1), -1, dtype=torch.int32)
    sample_BS = torch.cat([sample_N1.expand(-1, tokens), padding], dim=1)
    context = RoutingContext(
        modality_BS=torch.where(sample_BS >= 0, int(Modality.LANGUAGE), int(Modality.PADDING)).to(torch.int8),
        image_BS=torch.full_like(sample_BS, -1),
        sample_BS=sample_BS,
        num_samples=num_samples,
        cluster_N=None if clusters is None else torch.tensor(clusters),
        dataset_N=None if datasets is None else torch.tensor(datasets),
    )
    trace = RoutingTrace(context)
    for place, (name, layer) in enumerate(linears):
        ids_R1 = torch.tensor([[of_sample[place][0]] for of_sample in choices])
        gate_R1 = torch.tensor([[of_sample[place][1]] for of_sample in choices])
        rest = (1 - gate_R1) / (num_experts - 1)
        probs_RE = rest.expand(-1, num_experts).scatter(1, ids_R1, gate_R1)
        keep_R1 = torch.ones_like(ids_R1).bool()
        decision = RoutingDecision(probs_RE.log(), probs_RE, ids_R1, gate_R1, keep_R1, "sample")
        trace.record(Site(f"adapter.{name}", layer), decision)
    return trace
