"""The mixture-of-experts layer: router, dispatch, experts, combine.

B batch   S sequence   T tokens (B x S)   D model width
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_lvlm.moe.dispatch import Dispatcher, LocalDispatcher
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.types import ExpertAdapters
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext, Site


class MoELayer(nn.Module):
    """Stands where a decoder layer's FFN stood. Single-device code: a group comes in with the dispatcher.

    shared_experts: dense FFNs that every token passes with weight 1, or None.
    site: where the layer's decisions go in the trace.
    adapters: low-rank adapters on the experts' own matrices, or None; a module beside the experts, so that these hold
        what they always held.
    """

    adapters: ExpertAdapters | None

    def __init__(
        self,
        *,
        router: Router,
        experts: Experts,
        site: Site,
        shared_experts: nn.ModuleList | None = None,
        dispatcher: Dispatcher | None = None,
        adapters: ExpertAdapters | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.adapters = adapters
        self.site = site
        self.dispatcher = dispatcher or LocalDispatcher()

    def forward(
        self, x_BSD: Tensor, context: RoutingContext | None = None, trace: RoutingTrace | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D], 0 at padding (but for shared experts). Without a context all tokens are language."""
        if context is None:
            context = RoutingContext.all_language((x_BSD.shape[0], x_BSD.shape[1]), x_BSD.device)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        if context.modality_BS.shape != x_BSD.shape[:-1]:
            raise ValueError(
                f"routing context of shape {tuple(context.modality_BS.shape)} for hidden states of shape "
                f"{tuple(x_BSD.shape)}: they must describe the same tokens"
            )
        # What was decided for a whole sample when its prompt was read holds for what follows.
        earlier = None if context.prompt is None else context.prompt.get(self.site)
        decision = self.router(x_TD, context) if earlier is None else earlier
        if trace is not None:
            trace.record(self.site, decision)
        lora = None if self.adapters is None else self.adapters.choose(x_TD)
        dispatch = self.dispatcher.dispatch(x_TD, decision.by_token(context), lora)
        # while rows are under way, and their gradients in the backward pass
        shared_TD = [] if self.shared_experts is None else [expert(x_TD) for expert in self.shared_experts]
        out_TD = dispatch.combine(self.experts(dispatch.rows(), self.adapters))
        for shared in shared_TD:
            out_TD = out_TD + shared
        return out_TD.view_as(x_BSD)

    def held_by_expert(self) -> list[nn.Module]:
        """Modules whose own parameters, not their children's, have a row an expert: the experts, and adapters on them."""
        return [self.experts, *(() if self.adapters is None else self.adapters.children())]
