"""Experts that come and go while a stage trains (router `dynamic`, DynMoE's adaptive process).

E experts   D model width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_lvlm.analysis.measures import site_name
from moe_lvlm.checkpoint.fragments import LiveTraining
from moe_lvlm.checkpoint.layout import MOMENTS, Kind
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.dynamic import DynamicRouter
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality


@dataclass(frozen=True, slots=True)
class Change:
    """What one layer's experts become.

    removed, added: expert ids; one that was idle and is needed at once is added only. embedding_D: float32, unit
    length, of the added one; None where none is.
    """

    is_active: tuple[bool, ...]
    removed: tuple[int, ...]
    added: tuple[int, ...]
    embedding_D: Tensor | None


def plan_change(is_active: list[bool], taken: list[int], unrouted_D: Tensor) -> Change:
    """Drop the active experts that took no token; then, if some token had none, activate the lowest free slot.

    taken: tokens of each expert, and of none. unrouted_D: sum of the latter's hidden states; its direction becomes the
    new expert's embedding. As DynMoE's code does; ours is that one expert at least stays active, and that nothing
    changes where no token was seen.
    """
    *counts, num_unrouted = taken
    kept = [was_active and count > 0 for was_active, count in zip(is_active, counts, strict=True)]
    length = float(torch.linalg.vector_norm(unrouted_D.double()))
    free = [expert for expert, is_kept in enumerate(kept) if not is_kept]
    embedding_D: Tensor | None = None
    added: tuple[int, ...] = ()
    if num_unrouted and length > 0 and free:
        added = (free[0],)
        embedding_D = (unrouted_D.double() / length).float()
        kept[free[0]] = True
    if not any(kept):
        return Change(tuple(is_active), (), (), None)
    removed = tuple(expert for expert, was in enumerate(is_active) if was and not kept[expert])
    return Change(tuple(kept), removed, added, embedding_D)


class ExpertAdaptation:
    """Counts how tokens are routed, and adapts the experts every `adapt_every` steps of a stage.

    Layers with a dynamic router that the stage trains take part; without one nothing is ever done. The counts are
    summed over all ranks at every step and kept in the routers' buffers, the same on each rank and part of every
    checkpoint, so a run that goes on from one adapts as the unbroken one. A stage starts with counts of 0.

    A new expert has the embedding that its tokens point to, threshold 0, and the FFN that its slot holds, as in
    DynMoE's code: a copy of the dense FFN in a slot that was never used, else what the dropped expert had learnt. Its
    moments, and those of a dropped expert, are 0 (ours). Adam's count of steps is one for the whole stack and goes on.
    A dropped expert's rows have gradient 0 and stay, but for weight decay.
    """

    def __init__(self, model: nn.Module, *, is_new_stage: bool) -> None:
        self._layers: dict[str, MoELayer] = {
            name: layer
            for name, layer in moe_layers(model)
            if isinstance(layer.router, DynamicRouter)
            and layer.router.settings.adapt_every
            and layer.router.gate.weight.requires_grad
        }
        # This rank's since the last step: taken and unrouted_D, one after the other
        self._counts = {name: _no_counts(layer) for name, layer in self._layers.items()}
        if is_new_stage:
            for layer in self._layers.values():
                _router(layer).reset_counts()

    @property
    def is_needed(self) -> bool:
        """Whether `count` wants to see every micro-batch."""
        return bool(self._layers)

    @torch.no_grad()
    def count(self, trace: RoutingTrace) -> None:
        """Add this rank's micro-batch. A trace holds each decision once, also where checkpointing computes it again."""
        is_token_T = trace.context.modality_T != int(Modality.PADDING)
        for name, layer in self._layers.items():
            decision = trace[layer.site]
            assert decision.unrouted_D is not None, "a dynamic router counts in training mode"
            num_experts = decision.probs_RE.shape[-1]
            is_unrouted_T = is_token_T & ~decision.keep_RK.any(dim=-1)
            # those that none took count as an expert of their own; slots that are not kept go one further
            taker_A = torch.where(decision.keep_RK, decision.expert_ids_RK, num_experts + 1).flatten()
            taken = torch.bincount(taker_A, minlength=num_experts + 2)[: num_experts + 1]
            taken[num_experts] = is_unrouted_T.sum()
            units_D = (decision.unrouted_D.double() / DynamicRouter.UNIT).round().long()
            self._counts[name] += torch.cat((taken, units_D))

    def finish_step(self, step: int, live: Callable[[], LiveTraining], *, has_skipped: bool) -> dict[str, Any] | None:
        """After optimizer step number `step` (from 1) of the stage: what became of the experts, or None if it was not
        their turn. A collective.

        live: the engine's view, asked for where something changes. has_skipped: the step had gradients that were not
        finite; what it counted is worth nothing.

        Returns:
            {layer: {"active": number of experts, "added": ids, "removed": ids, "taken": tokens that each expert took since the
            last time, "unrouted": tokens that none took}}.
        """
        if not self._layers:
            return None
        self._sum_over_ranks(has_skipped=has_skipped)
        due = {
            name: layer
            for name, layer in self._layers.items()
            if step % _router(layer).settings.adapt_every == 0 and _router(layer).taken.any()
        }
        if not due:
            return None
        changes = {name: _plan(_router(layer)) for name, layer in due.items()}
        rows = {}
        for name, change in changes.items():
            rows.update(_rows(name, due[name], change))
        if rows:
            training = live()
            training.write_rows(rows)
            training.refresh()
        report = {}
        for name, change in changes.items():
            router = _router(due[name])
            report[site_name(due[name].site)] = _report(router, change)
            router.is_active_E.copy_(torch.tensor(change.is_active))
            router.reset_counts()
        return report

    def _sum_over_ranks(self, *, has_skipped: bool) -> None:
        counts = torch.cat(list(self._counts.values()))
        self._counts = {name: _no_counts(layer) for name, layer in self._layers.items()}
        if has_skipped:
            return
        dist.all_reduce(counts)
        for layer, mine in zip(
            self._layers.values(), counts.split([one.numel() for one in self._counts.values()]), strict=True
        ):
            router = _router(layer)
            taken, unrouted_D = mine.split([router.taken.numel(), router.unrouted_D.numel()])
            router.taken.add_(taken)
            router.unrouted_D.add_(unrouted_D)


def _router(layer: MoELayer) -> DynamicRouter:
    assert isinstance(layer.router, DynamicRouter)
    return layer.router


def _no_counts(layer: MoELayer) -> Tensor:
    router = _router(layer)
    return torch.zeros_like(torch.cat((router.taken, router.unrouted_D)))


def _plan(router: DynamicRouter) -> Change:
    # doubles hold the integers exactly up to 2^53, and only the direction matters
    return plan_change(router.is_active_E.tolist(), router.taken.tolist(), router.unrouted_D.cpu().double())


def _rows(name: str, layer: MoELayer, change: Change) -> dict[tuple[str, Kind], dict[int, Tensor | None]]:
    """What is written: moments of all experts that came or went, embedding and threshold of the new one."""
    rows: dict[tuple[str, Kind], dict[int, Tensor | None]] = {}
    changed = (*change.removed, *change.added)
    if not changed:
        return rows
    gate = [f"{name}.router.gate.{leaf}" for leaf in ("weight", "threshold")]
    for parameter in (*gate, *(f"{name}.experts.{leaf}" for leaf, _ in layer.experts.named_parameters())):
        for kind in MOMENTS:
            rows[parameter, kind] = dict.fromkeys(changed)
    for expert in change.added:
        rows[gate[0], "master"] = {expert: change.embedding_D}
        rows[gate[1], "master"] = {expert: None}
    return rows


def _report(router: DynamicRouter, change: Change) -> dict[str, Any]:
    *counts, num_unrouted = router.taken.tolist()
    return {
        "active": sum(change.is_active),
        "added": list(change.added),
        "removed": list(change.removed),
        "taken": counts,
        "unrouted": num_unrouted,
    }
