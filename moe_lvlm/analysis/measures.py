"""What one routing trace says: expert load, tail tokens, entropy. Pure functions on tensors.

B batch   S sequence   T tokens (B x S)   E experts   K slots   R routed rows   M modalities, in the order of MODALITIES
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_lvlm.routing.ltdr import vision_tail
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import LANGUAGE_MODEL, Modality, RoutingContext, RoutingDecision, Site

#: Rows of every table by modality. Padding takes part in nothing.
MODALITIES = (Modality.LANGUAGE, Modality.VISION)


def routing_entropy(probs_RE: Tensor) -> Tensor:
    """Entropy of each row's routing probabilities in nats, [R]: 0 for one sure expert, log E for a uniform row."""
    return torch.special.entr(probs_RE.detach().float()).sum(dim=-1)


def tail_flags(probs_TE: Tensor, context: RoutingContext) -> Tensor:
    """Vision tail tokens (LTDR eq. 11): RPV above the mean RPV of the vision tokens of the same image. Bool [T].

    The scope is always the image, also where a router was trained with the scope `batch`, so that the flags of an
    image do not depend on what else is in the batch, and routers with other rules are measured by the same one.
    """
    return vision_tail(probs_TE, context, scope="image")


def expert_load(routing: RoutingDecision, modality_T: Tensor) -> Tensor:
    """Assignments kept, by modality and expert: int64 [M, E], rows as in MODALITIES. routing: a row a token."""
    return _count_slots(routing, routing.keep_RK, modality_T)


def dropped_load(routing: RoutingDecision, modality_T: Tensor) -> Tensor:
    """Assignments dropped for want of capacity, by modality and expert, as `expert_load`; 0 where nothing ever is."""
    dropped_TK = torch.zeros_like(routing.keep_RK) if routing.dropped_RK is None else routing.dropped_RK
    return _count_slots(routing, dropped_TK, modality_T)


def conflict_load(routing: RoutingDecision, modality_T: Tensor) -> Tensor:
    """Assignments in conflict (STGC), by modality and expert, as `expert_load`: to be counted after the backward pass,
    which finds them. 0 where nobody asks."""
    conflict_TK = torch.zeros_like(routing.keep_RK) if routing.conflict_RK is None else routing.conflict_RK
    return _count_slots(routing, conflict_TK, modality_T)


def _count_slots(routing: RoutingDecision, counted_TK: Tensor, modality_T: Tensor) -> Tensor:
    num_experts = routing.probs_RE.shape[-1]
    load_ME = torch.zeros(len(MODALITIES), num_experts, dtype=torch.int64, device=modality_T.device)
    expert_A = routing.expert_ids_RK.flatten()
    for row, modality in enumerate(MODALITIES):
        of_modality_TK = counted_TK & (modality_T == int(modality))[:, None]
        load_ME[row].index_add_(0, expert_A, of_modality_TK.flatten().long())
    return load_ME


def tail_by_site(trace: RoutingTrace, image: int) -> dict[Site, Tensor]:
    """Tail flags of one image's tokens at every layer with experts of the language model, bool [tokens of the image] on the CPU, in patch order.

    Raises:
        ValueError: the trace's batch has no such image.
    """
    context = trace.context
    of_image_T = (context.image_T == image) & (context.modality_T == int(Modality.VISION))
    if not bool(of_image_T.any()):
        highest = int(context.image_T.max()) if context.image_T.numel() else -1
        raise ValueError(f"image {image}: not in this trace's batch; allowed: 0 to {highest}")
    return {
        site: tail_flags(decision.by_token(context).probs_RE, context)[of_image_T].cpu()
        for site, decision in trace.of(LANGUAGE_MODEL)
    }


class LoadCounter:
    """Expert load, dropped and conflicting assignments and tail tokens over some micro-batches, in integers that ranks
    can add up. Conflicts are there after a micro-batch's backward pass only.

    Everything stays on the device until `summary`. To sum over ranks: all-reduce each of `tensors()` in place.
    """

    def __init__(self) -> None:
        self._load: dict[Site, Tensor] = {}
        self._dropped: dict[Site, Tensor] = {}
        self._conflicts: dict[Site, Tensor] = {}
        self._tail: dict[Site, Tensor] = {}

    def update(self, trace: RoutingTrace) -> None:
        """Add a micro-batch (attached or detached: no gradient is kept)."""
        context = trace.context
        vision = (context.modality_T == int(Modality.VISION)).sum()
        for site, decision in trace.items():
            routing = decision.by_token(context)
            _add(self._load, site, expert_load(routing, context.modality_T))
            if site.part == LANGUAGE_MODEL:
                tail = tail_flags(routing.probs_RE, context).sum()
                _add(self._tail, site, torch.stack((tail, vision)))
            if routing.dropped_RK is not None:
                _add(self._dropped, site, dropped_load(routing, context.modality_T))
            if routing.conflict_RK is not None:
                _add(self._conflicts, site, conflict_load(routing, context.modality_T))

    def tensors(self) -> Iterable[Tensor]:
        """The counts, in the order in which layers were passed: the same on every rank."""
        yield from self._load.values()
        yield from self._dropped.values()
        yield from self._conflicts.values()
        yield from self._tail.values()

    def summary(self) -> dict[str, dict | None]:
        """For the training log: `{"expert_load": {layer: {modality: [E counts]}}, "tail_share": {layer: share}}`, and
        `"dropped"` as expert_load where a capacity is set, `"conflicts"` likewise where the router looks for them.

        Layers are strings as JSON has them ("0"; sites outside the language model are "part.layer"). A connector routes images
        as a whole, their visual tokens are counted; only experts of the language model have a tail. Without a MoE layer both
        are None; without a vision token `tail_share` is.
        """
        if not self._load:
            return {"expert_load": None, "tail_share": None}
        shares = {
            site_name(site): tail / vision
            for site, (tail, vision) in ((site, both.tolist()) for site, both in self._tail.items())
            if vision
        }
        found: dict[str, dict | None] = {"expert_load": _by_layer(self._load), "tail_share": shares or None}
        optional = {"dropped": self._dropped, "conflicts": self._conflicts}
        return found | {name: _by_layer(counts) for name, counts in optional.items() if counts}


def _add(sums: dict[Site, Tensor], site: Site, counts: Tensor) -> None:
    sums[site] = counts if site not in sums else sums[site] + counts


def _by_layer(counts: dict[Site, Tensor]) -> dict[str, dict[str, list[int]]]:
    """{layer: {modality: [E counts]}}"""
    return {
        site_name(site): {
            modality.name.lower(): row for modality, row in zip(MODALITIES, counts_ME.tolist(), strict=True)
        }
        for site, counts_ME in counts.items()
    }


def site_name(site: Site) -> str:
    """A site in logs and figures: the layer's index, with its part before it outside the language model."""
    return str(site.layer) if site.part == LANGUAGE_MODEL else f"{site.part}.{site.layer}"


def site_of(name: str) -> Site:
    """`site_name` undone."""
    part, _, layer = name.rpartition(".")
    return Site(part or LANGUAGE_MODEL, int(layer))
