"""LTDR's CLUSTER: samples are routed by the cluster that their instruction belongs to.

T tokens   D model width   N samples   G width of an embedding
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lvlm.config.moe import ClusterRouterSettings, MoEConfig
from moe_lvlm.routing.router import SampleRouter
from moe_lvlm.routing.types import RoutingContext


class Embeddings(nn.Module):
    """A table of learned vectors, drawn from N(0, 0.02). weight: [rows, G]."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors anew."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, index_N: Tensor) -> Tensor:
        return nn.functional.embedding(index_N, self.weight)


class ClusterRouter(SampleRouter):
    """The gate reads a learned embedding of the sample's cluster, which starts at the cluster's centre (LTDR appendix
    A.3, after MoCLE). Each layer learns a table of its own: the paper does not say whether layers share one."""

    settings: ClusterRouterSettings

    def __init__(self, *, model_width: int, config: MoEConfig) -> None:
        super().__init__(model_width=model_width, config=config)
        self.embedding = Embeddings(self.settings.num_clusters, self.settings.embedding_width)

    @property
    def gate_width(self) -> int:
        return self.settings.embedding_width

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.embedding.reset_parameters()

    def describe_samples(self, x_TD: Tensor, context: RoutingContext, num_samples: int) -> Tensor:
        """Raises ValueError without clusters, or with one that the table does not hold."""
        if num_samples == 0:
            return self.embedding(torch.zeros(1, dtype=torch.int64, device=x_TD.device))
        cluster_N = context.cluster_N
        if cluster_N is None:
            raise ValueError(
                "router cluster: the instructions' clusters are not known; allowed: data.clusters in the recipe, or "
                "cluster_ids [B] beside input_ids"
            )
        lowest, highest = cluster_N.aminmax()
        if int(lowest) < 0 or int(highest) >= self.settings.num_clusters:
            wrong = int(lowest) if int(lowest) < 0 else int(highest)
            raise ValueError(f"router cluster: cluster {wrong}; allowed: 0 to {self.settings.num_clusters - 1}")
        return self.embedding(cluster_N[:num_samples])
