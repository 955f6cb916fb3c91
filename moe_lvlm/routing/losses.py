"""Auxiliary losses, pure functions of a trace. They are computed after the forward pass, never inside a layer.

T tokens   E experts   K slots a token
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lvlm.config.moe import BalanceSettings
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision


def balance_loss(decision: RoutingDecision, is_balanced_T: Tensor, *, fraction: str = "top1") -> Tensor:
    """Load-balancing loss of one layer, K * sum_i F_i G_i over the tokens marked (LTDR eq. 8, 10); 1 when even.

    F_i is the share of tokens whose best expert is i (`fraction="top1"`) or the share of assignments to i
    (`"all_choices"`), without gradient; G_i is the mean probability of i. No token marked gives 0, with a gradient
    of 0 rather than none, so that every rank's backward pass has the same graph.

    Departs from LTDR eq. 10, which drops the factor K of eq. 8: it is kept (SPEC: held to be a slip).
    """
    num_experts = decision.probs_RE.shape[-1]
    mark_T1 = is_balanced_T[:, None]
    count = is_balanced_T.sum().clamp_min(1)

    if fraction == "top1":
        chosen_TE = torch.nn.functional.one_hot(decision.expert_ids_RK[:, 0], num_experts) * mark_T1
    else:
        slots_TKE = torch.nn.functional.one_hot(decision.expert_ids_RK, num_experts)
        chosen_TE = (slots_TKE * (decision.keep_RK & mark_T1)[..., None]).sum(dim=1)
    load_E = chosen_TE.sum(dim=0).float()
    fraction_E = load_E / load_E.sum().clamp_min(1)
    mean_probability_E = torch.where(mark_T1, decision.probs_RE, 0.0).sum(dim=0) / count
    return num_experts * (fraction_E * mean_probability_E).sum()


def balanced_tokens(context: RoutingContext, settings: BalanceSettings) -> Tensor:
    """Bool [T]: the tokens that the balance loss counts. Padding is never among them."""
    modality_T = context.modality_T
    is_balanced_T = torch.zeros_like(modality_T, dtype=torch.bool)
    for name in settings.on:
        is_balanced_T |= modality_T == int(Modality[name.upper()])
    return is_balanced_T


def auxiliary_loss(trace: RoutingTrace, settings: BalanceSettings) -> Tensor | None:
    """Balance loss summed over all MoE layers, times its coefficient; None if no layer made a decision."""
    if not len(trace):
        return None
    is_balanced_T = balanced_tokens(trace.context, settings)
    total = torch.stack(
        [
            balance_loss(decision, is_balanced_T.to(decision.probs_RE.device), fraction=settings.fraction)
            for _, decision in trace.items()
        ]
    ).sum()
    return settings.coefficient * total
