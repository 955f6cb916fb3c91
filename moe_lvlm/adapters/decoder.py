"""Decoder layers that tell their adapted linears what the tokens are, made for each family's layer class.

They compute what their family's class computes, dense or with experts: the linears in it are what has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from moe_lvlm.adapters.facts import BatchFacts
from moe_lvlm.adapters.linear import AdaptedLinear
from moe_lvlm.moe.decoder import FAMILIES, MoEDecoderLayer
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext


class AdaptedDecoderLayer(nn.Module):
    """Comes before a family's layer class among the bases, and takes over all that a layer of it is."""

    gradient_checkpointing: bool

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        # Children, hooks and settings at once, and the dictionaries themselves: handles of hooks go on working.
        self.__dict__.update(layer.__dict__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            function = self._gradient_checkpointing_func
            if getattr(function, "keywords", {}).get("use_reentrant", False):
                raise ValueError(
                    "gradient checkpointing: use_reentrant=True loses gradients of the adapters' table; "
                    'allowed: gradient_checkpointing_enable({"use_reentrant": False})'
                )
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        routing: RoutingContext | None = None,
        routing_trace: RoutingTrace | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's layer. Without a context all tokens are language and each row is a sample."""
        if routing is None:
            routing = RoutingContext.all_language(
                (hidden_states.shape[0], hidden_states.shape[1]), hidden_states.device
            )
        with _tell(self, BatchFacts(routing, routing_trace)):
            return super().forward(hidden_states, **self._for_family(routing, routing_trace), **kwargs)

    def _for_family(self, routing: RoutingContext, trace: RoutingTrace | None) -> dict[str, Any]:
        """What the family's own layer takes of them."""
        return {}


class AdaptedMoEDecoderLayer(AdaptedDecoderLayer):
    """The same before a class of layers with experts, which have a use for the facts themselves."""

    def _for_family(self, routing: RoutingContext, trace: RoutingTrace | None) -> dict[str, Any]:
        return {"routing": routing, "routing_trace": trace}


@contextmanager
def _tell(layer: nn.Module, facts: BatchFacts) -> Iterator[None]:
    """The layer's adapters know the facts for as long as this lasts, however it ends. A recompute under gradient
    checkpointing comes by here again."""
    adapters = [module for module in layer.modules() if isinstance(module, AdaptedLinear)]
    for adapter in adapters:
        adapter.facts = facts
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.facts = None


def adapt_layer(layer: nn.Module) -> AdaptedDecoderLayer:
    """The adapted layer in the place of one of a known family; its linears are those of the layer.

    Raises:
        ValueError: another class of layer.
    """
    return _ADAPTED[find_base(layer)](layer)


def find_base(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer that can be adapted.

    Raises:
        ValueError: another class of layer.
    """
    if type(layer) not in BASES:
        known = ", ".join(sorted(base.__name__ for base in BASES))
        raise ValueError(f"decoder layer {type(layer).__name__} cannot take adapters; allowed: {known}")
    return type(layer)


BASES: frozenset[type[nn.Module]] = frozenset(
    {family.dense for family in FAMILIES} | {family.moe for family in FAMILIES} | {OPTDecoderLayer}
)
"""Classes of decoder layers that can be adapted; each is handed unknown keyword arguments by its model."""


def _adapted_class(base: type[nn.Module]) -> type[AdaptedDecoderLayer]:
    """A subclass of the family's layer class, since transformers records hidden states by class."""
    mixin = AdaptedMoEDecoderLayer if issubclass(base, MoEDecoderLayer) else AdaptedDecoderLayer
    return type(f"Adapted{base.__name__}", (mixin, base), {"__module__": __name__, "__doc__": mixin.__doc__})


_ADAPTED = {base: _adapted_class(base) for base in BASES}
