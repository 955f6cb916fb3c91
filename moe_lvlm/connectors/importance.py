"""The importance loss: experts should be used evenly over samples.

L layers   N samples (rows of a decision)   E experts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lvlm.routing.types import RoutingDecision


def importance_loss(decisions: Sequence[RoutingDecision], sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """Squared coefficient of variation of the experts' importance, mean over layers (Q-MoE eq. 9, 10); no coefficient.

    An expert's importance is the sum, over the samples that a decision keeps, of its probability without noise. The
    paper says `std` only: it is the population's here. No sample anywhere gives 0, with a gradient of 0 rather than
    none, so that every rank's backward pass has the same graph.

    decisions: of each layer with experts, the same layers on every rank. sum_over_ranks: a differentiable sum over the
    ranks that share the batch, called once.

    Raises:
        ValueError: no decision.
    """
    if not decisions:
        raise ValueError("importance loss: no decisions; it needs one of each layer with experts")
    importance_LE = torch.stack(
        [torch.where(decision.keep_RK[:, :1], decision.probs_RE, 0.0).sum(dim=0) for decision in decisions]
    )
    importance_LE = sum_over_ranks(importance_LE)
    square_L = importance_LE.mean(dim=1).square()
    variance_L = importance_LE.var(dim=1, unbiased=False)
    return (variance_L / torch.where(square_L > 0, square_L, 1.0)).mean()
