"""The record of a forward pass's routing decisions: the one way in which results come back from MoE layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moe_lvlm.routing.types import RoutingContext, RoutingDecision, Site


class RoutingTrace:
    """Decisions by site. The first write stays: a recompute under gradient checkpointing changes nothing.

    A layer never reads it, so a layer's output cannot depend on it.
    """

    def __init__(self, context: RoutingContext) -> None:
        self.context = context
        self._decisions: dict[Site, RoutingDecision] = {}

    def record(self, site: Site, decision: RoutingDecision) -> None:
        """Keep a decision, unless this site has one."""
        self._decisions.setdefault(site, decision)

    def __getitem__(self, site: Site) -> RoutingDecision:
        return self._decisions[site]

    def __len__(self) -> int:
        return len(self._decisions)

    def decisions(self) -> Mapping[Site, RoutingDecision]:
        """All decisions by site."""
        return dict(self._decisions)

    def items(self) -> Iterator[tuple[Site, RoutingDecision]]:
        """In the order in which the sites were passed."""
        yield from self._decisions.items()

    def of(self, part: str) -> list[tuple[Site, RoutingDecision]]:
        """Those of one part of the model, in the order in which its sites were passed."""
        return [(site, decision) for site, decision in self._decisions.items() if site.part == part]

    def detach(self) -> RoutingTrace:
        """The same record outside the graph, for statistics after the backward pass."""
        embedding_NG = self.context.embedding_NG
        facts = replace(self.context, embedding_NG=None if embedding_NG is None else embedding_NG.detach())
        detached = RoutingTrace(facts)
        for site, decision in self._decisions.items():
            detached.record(site, decision.detach())
        return detached
