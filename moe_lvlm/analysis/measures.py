"""What one routing trace says: expert load, tail tokens, entropy. Pure functions on tensors.

B batch   S sequence   T tokens (B x S)   E experts   K slots   R routed rows   M modalities, in the order of MODALITIES
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lvlm.routing.ltdr import vision_tail
from moe_lvlm.routing.trace import RoutingTrace, Site
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision

#: Rows of every table by modality. Padding takes part in nothing.
MODALITIES = (Modality.LANGUAGE, Modality.VISION)


class TokenRouting(NamedTuple):
    """A layer's routing, one row a token, whatever the level of the router.

    probs_TE: float32, 0 at tokens that were not routed. expert_ids_TK, keep_TK: as in RoutingDecision.
    """

    probs_TE: Tensor
    expert_ids_TK: Tensor
    keep_TK: Tensor


def token_routing(decision: RoutingDecision, sample_T: Tensor) -> TokenRouting:
    """A decision by token: a sample-level decision is repeated for every token of its sample.

    Args:
        sample_T: index of the sample that a token belongs to, negative at padding.

    Raises:
        ValueError: a token-level decision has another number of rows than there are tokens.
    """
    if decision.level == "sample":
        routed_T = sample_T >= 0
        row_T = sample_T.clamp(min=0).long()
        return TokenRouting(
            decision.probs_RE[row_T] * routed_T[:, None],
            decision.expert_ids_RK[row_T],
            decision.keep_RK[row_T] & routed_T[:, None],
        )
    if decision.probs_RE.shape[0] != sample_T.shape[0]:
        raise ValueError(
            f"the decision has {decision.probs_RE.shape[0]} rows and the context {sample_T.shape[0]} tokens; "
            "a token-level decision needs one row a token"
        )
    return TokenRouting(decision.probs_RE, decision.expert_ids_RK, decision.keep_RK)


def routing_entropy(probs_RE: Tensor) -> Tensor:
    """Entropy of each row's routing probabilities in nats, [R]: 0 for one sure expert, log E for a uniform row."""
    return torch.special.entr(probs_RE.detach().float()).sum(dim=-1)


def tail_flags(probs_TE: Tensor, context: RoutingContext) -> Tensor:
    """Vision tail tokens (LTDR eq. 11): RPV above the mean RPV of the vision tokens of the same image. Bool [T].

    The scope is always the image, also where a router was trained with the scope `batch`, so that the flags of an
    image do not depend on what else is in the batch, and routers with other rules are measured by the same one.
    """
    return vision_tail(probs_TE, context, scope="image")


def expert_load(routing: TokenRouting, modality_T: Tensor) -> Tensor:
    """Assignments kept, by modality and expert: int64 [M, E], rows as in MODALITIES."""
    num_experts = routing.probs_TE.shape[-1]
    load_ME = torch.zeros(len(MODALITIES), num_experts, dtype=torch.int64, device=modality_T.device)
    expert_A = routing.expert_ids_TK.flatten()
    for row, modality in enumerate(MODALITIES):
        kept_TK = routing.keep_TK & (modality_T == int(modality))[:, None]
        load_ME[row].index_add_(0, expert_A, kept_TK.flatten().long())
    return load_ME


def tail_by_site(trace: RoutingTrace, image: int) -> dict[Site, Tensor]:
    """Tail flags of one image's tokens at every site, bool [tokens of the image] on the CPU, in patch order.

    Raises:
        ValueError: the trace's batch has no such image.
    """
    context = trace.context
    of_image_T = (context.image_T == image) & (context.modality_T == int(Modality.VISION))
    if not bool(of_image_T.any()):
        highest = int(context.image_T.max()) if context.image_T.numel() else -1
        raise ValueError(f"image {image}: not in this trace's batch; allowed: 0 to {highest}")
    flags = {}
    for site, decision in trace.items():
        routing = token_routing(decision, context.sample_T)
        flags[site] = tail_flags(routing.probs_TE, context)[of_image_T].cpu()
    return flags


class LoadCounter:
    """Expert load and tail tokens over some micro-batches, in integers that ranks can add up.

    Everything stays on the device until `summary`. To sum over ranks: all-reduce each of `tensors()` in place.
    """

    def __init__(self) -> None:
        self._load: dict[Site, Tensor] = {}
        self._tail: dict[Site, Tensor] = {}

    def update(self, trace: RoutingTrace) -> None:
        """Add a micro-batch (attached or detached: no gradient is kept)."""
        context = trace.context
        vision = (context.modality_T == int(Modality.VISION)).sum()
        for site, decision in trace.items():
            routing = token_routing(decision, context.sample_T)
            load_ME = expert_load(routing, context.modality_T)
            tail = tail_flags(routing.probs_TE, context).sum()
            tail_and_vision = torch.stack((tail, vision))
            if site in self._load:
                self._load[site] += load_ME
                self._tail[site] += tail_and_vision
            else:
                self._load[site], self._tail[site] = load_ME, tail_and_vision

    def tensors(self) -> Iterable[Tensor]:
        """The counts, in the order in which layers were passed: the same on every rank."""
        yield from self._load.values()
        yield from self._tail.values()

    def summary(self) -> dict[str, dict | None]:
        """For the training log: `{"expert_load": {layer: {modality: [E counts]}}, "tail_share": {layer: share}}`.

        Layers are strings as JSON has them ("0"; sites outside the language model are "part.layer"). Without a MoE
        layer both are None; without a vision token `tail_share` is.
        """
        if not self._load:
            return {"expert_load": None, "tail_share": None}
        loads, shares = {}, {}
        for site, load_ME in self._load.items():
            rows = load_ME.tolist()
            loads[site_name(site)] = {
                modality.name.lower(): row for modality, row in zip(MODALITIES, rows, strict=True)
            }
            tail, vision = self._tail[site].tolist()
            if vision:
                shares[site_name(site)] = tail / vision
        return {"expert_load": loads, "tail_share": shares or None}


def site_name(site: Site) -> str:
    """A site in logs and figures: the layer's index, with its part before it outside the language model."""
    return str(site.layer) if site.part == "language_model" else f"{site.part}.{site.layer}"
