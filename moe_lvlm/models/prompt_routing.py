"""What was decided for whole samples at the prompt, handed on from step to step of `generate`."""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin

from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingDecision, Site


def prompt_decisions(trace: RoutingTrace | None, *, is_cached: bool) -> dict[Site, RoutingDecision] | None:
    """The trace's decisions for whole samples, out of the graph; None where there are none, or no cache to go on from."""
    if trace is None or not is_cached:
        return None
    found = {site: decision.detach() for site, decision in trace.items() if decision.level == "sample"}
    return found or None


class PromptRoutingMixin(GenerationMixin):
    """Comes before transformers' class among the bases of a model whose outputs have `prompt_routing`."""

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Beams of one sample share what was decided."""
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.prompt_routing is not None:
            updated["prompt_routing"] = outputs.prompt_routing
        return updated
