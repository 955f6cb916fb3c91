"""Where the embeddings of cluster routers start.

K clusters   G width of an embedding
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lvlm.config.moe import ClusterRouterSettings
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.cluster import ClusterRouter


def check_centres(num_clusters: int, width: int, settings: ClusterRouterSettings) -> None:
    """Whether a router's embeddings can start at so many centres of this width.

    Raises:
        ValueError: another width than the embeddings', or more centres than embeddings.
    """
    if width != settings.embedding_width:
        raise ValueError(
            f"moe.router.embedding_width: {settings.embedding_width}, but the centres of data.clusters are {width} "
            f"wide; allowed: {width}"
        )
    if num_clusters > settings.num_clusters:
        raise ValueError(
            f"moe.router.num_clusters: {settings.num_clusters}, but data.clusters holds {num_clusters} clusters; "
            f"allowed: {num_clusters} or more"
        )


@torch.no_grad()
def start_clusters(model: nn.Module, centres_KG: Tensor) -> int:
    """Let the embeddings of every cluster router start at the centres (LTDR appendix A.3); returns how many there are.

    Data with fewer distinct instructions than a router has embeddings gives fewer centres: the embeddings beyond stay
    0, and no sample ever reads them. Every rank must hand in the same centres.

    Raises:
        ValueError: centres that a router cannot take.
    """
    routers = [layer.router for _, layer in moe_layers(model) if isinstance(layer.router, ClusterRouter)]
    for router in routers:
        check_centres(centres_KG.shape[0], centres_KG.shape[1], router.settings)
        weight = router.embedding.weight
        weight.zero_()
        weight[: len(centres_KG)].copy_(centres_KG)
    return len(routers)
