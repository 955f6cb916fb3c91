"""Where the embeddings of cluster routers start."""

from __future__ import annotations

import pytest
import torch

from moe_lvlm.config.moe import ClusterRouterSettings, MoEConfig
from moe_lvlm.models.clusters import start_clusters
from moe_lvlm.moe.upcycle import moe_layers
from tests.tiny_models import tiny_moe_llava

CONFIG = MoEConfig(num_experts=4, top_k=2, router=ClusterRouterSettings(num_clusters=3, embedding_width=5))
CENTRES = torch.arange(10, dtype=torch.float32).view(2, 5)


def test_every_router_starts_at_the_centres() -> None:
    model = tiny_moe_llava(CONFIG)
    layers = moe_layers(model)
    gates = [layer.router.gate.weight.clone() for _, layer in layers]
    assert start_clusters(model, CENTRES) == len(layers) > 1
    for (_, layer), gate in zip(layers, gates, strict=True):
        weight = layer.router.embedding.weight
        assert weight.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 0, 0, 0, 0]]
        assert weight.requires_grad
        assert torch.equal(layer.router.gate.weight, gate)


def test_centres_that_do_not_fit_are_refused() -> None:
    model = tiny_moe_llava(CONFIG)
    with pytest.raises(ValueError, match=r"embedding_width: 5, but .* are 4 wide; allowed: 4"):
        start_clusters(model, CENTRES[:, :4])
    with pytest.raises(ValueError, match=r"num_clusters: 3, but data\.clusters holds 4 clusters; allowed: 4 or more"):
        start_clusters(model, torch.zeros(4, 5))


def test_other_routers_are_left_alone() -> None:
    model = tiny_moe_llava(MoEConfig(num_experts=4, top_k=2))
    assert start_clusters(model, CENTRES) == 0
