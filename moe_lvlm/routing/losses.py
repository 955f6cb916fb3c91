"""Auxiliary losses, pure functions of a trace. They are computed after the forward pass, never inside a layer.

T tokens   E experts   K slots a token
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_lvlm.config.moe import BalanceSettings, ModalityGroupRouterSettings, MoEConfig, TaskRouterSettings
from moe_lvlm.routing.task import task_loss
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import LANGUAGE_MODEL, Modality, RoutingContext, RoutingDecision


def balance_loss(
    decision: RoutingDecision, is_balanced_T: Tensor, *, fraction: str = "top1", num_experts: int | None = None
) -> Tensor:
    """Load-balancing loss of one layer, K * sum_i F_i G_i over the tokens marked (LTDR eq. 8, 10); 1 when even.

    num_experts: K, where the tokens marked may choose among fewer than all.

    F_i is the share of tokens whose best expert is i (`fraction="top1"`) or the share of assignments to i
    (`"all_choices"`), without gradient; G_i is the mean probability of i. No token marked gives 0, with a gradient
    of 0 rather than none, so that every rank's backward pass has the same graph.

    Departs from LTDR eq. 10, which drops the factor K of eq. 8: it is kept (SPEC: held to be a slip).
    """
    all_experts = decision.probs_RE.shape[-1]
    mark_T1 = is_balanced_T[:, None]
    count = is_balanced_T.sum().clamp_min(1)

    if fraction == "top1":
        chosen_TE = torch.nn.functional.one_hot(decision.expert_ids_RK[:, 0], all_experts) * mark_T1
    else:
        slots_TKE = torch.nn.functional.one_hot(decision.expert_ids_RK, all_experts)
        chosen_TE = (slots_TKE * (_chosen(decision) & mark_T1)[..., None]).sum(dim=1)
    load_E = chosen_TE.sum(dim=0).float()
    fraction_E = load_E / load_E.sum().clamp_min(1)
    mean_probability_E = torch.where(mark_T1, decision.probs_RE, 0.0).sum(dim=0) / count
    return (num_experts or all_experts) * (fraction_E * mean_probability_E).sum()


def _chosen(decision: RoutingDecision) -> Tensor:
    """Slots that were chosen, dropped or not: dropping must not hide an imbalance."""
    return decision.keep_RK if decision.dropped_RK is None else decision.keep_RK | decision.dropped_RK


def balanced_tokens(context: RoutingContext, modalities: Iterable[str]) -> Tensor:
    """Bool [T]: the tokens of these modalities. Padding is never among them."""
    modality_T = context.modality_T
    is_balanced_T = torch.zeros_like(modality_T, dtype=torch.bool)
    for name in modalities:
        is_balanced_T |= modality_T == int(Modality[name.upper()])
    return is_balanced_T


def layer_loss(decision: RoutingDecision, context: RoutingContext, config: MoEConfig) -> Tensor:
    """All auxiliary losses of one layer, each times its coefficient."""
    decision = decision.by_token(context)
    balance = config.balance
    if isinstance(config.router, ModalityGroupRouterSettings):
        loss = balance.coefficient * _group_balance(decision, context, balance, config.num_experts, config.router)
    else:
        is_balanced_T = balanced_tokens(context, balance.on)
        loss = balance.coefficient * balance_loss(decision, is_balanced_T, fraction=balance.fraction)
    if isinstance(config.router, TaskRouterSettings):
        loss = loss + config.router.coefficient * task_loss(decision, context)
    return loss if decision.penalty is None else loss + decision.penalty


def _group_balance(
    decision: RoutingDecision,
    context: RoutingContext,
    balance: BalanceSettings,
    num_experts: int,
    router: ModalityGroupRouterSettings,
) -> Tensor:
    """A loss for each modality's group of experts, with K, F and G of the group (LTDR table 11)."""
    sizes = {"vision": router.vision_experts, "language": num_experts - router.vision_experts}
    losses = [
        balance_loss(
            decision,
            balanced_tokens(context, [modality] if modality in balance.on else []),
            fraction=balance.fraction,
            num_experts=size,
        )
        for modality, size in sizes.items()
    ]
    return torch.stack(losses).sum()


def auxiliary_loss(trace: RoutingTrace, config: MoEConfig) -> Tensor | None:
    """The auxiliary losses of all MoE layers, summed; None if no layer made a decision. Connectors have losses of their
    own (`connectors.importance`), adapters none."""
    decisions = [decision for _, decision in trace.of(LANGUAGE_MODEL)]
    if not decisions:
        return None
    context = trace.context
    # layers may be spread over devices
    losses = [layer_loss(decision, context.to(decision.probs_RE.device), config) for decision in decisions]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
