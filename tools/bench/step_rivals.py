"""What other stacks put in the place of our MoE layer, as the FFN of the same decoder with the same weights.

B batch   S sequence   T tokens (B x S)   D model width   E experts   C capacity of an expert   K slots
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench import rivals
from bench.problem import Problem, Sizes
from bench.rivals import UnavailableError
from moe_lvlm.models.build import VLM
from moe_lvlm.moe.decoder import MoEDecoderLayer
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext, RoutingDecision

CAPACITY = 1.5


class AllExpertsRouter(Router):
    """Another router's decision, carried out by all experts for all tokens, most of them with weight 0."""

    def __init__(self, inner: Router) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.num_experts = inner.num_experts
        self.needs_attention = inner.needs_attention

    def reset_parameters(self) -> None:
        self.inner.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = self.inner(x_TD, context).by_token(context)
        kept_RK = decision.weights_RK * decision.keep_RK
        weights_RE = torch.zeros_like(decision.probs_RE).scatter_add(1, decision.expert_ids_RK, kept_RK)
        # best first, as balance losses read them
        ids_RE = decision.probs_RE.detach().argsort(dim=-1, descending=True, stable=True)
        return decision._replace(
            expert_ids_RK=ids_RE,
            weights_RK=weights_RE.gather(1, ids_RE),
            keep_RK=torch.ones_like(ids_RE, dtype=torch.bool),
            dropped_RK=None,
        )


class RivalFFN(nn.Module):
    """One FFN of another stack behind our decoder layer's interface. dropped: (token, expert) assignments that the last
    pass left out. auxiliary: its balance loss; None where ours is computed from the trace."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.dropped: Tensor | None = None
        self.auxiliary: Tensor | None = None


class _NoRouter(nn.Module):
    """Says what a decoder layer asks of a router."""

    needs_attention = False


class TransformersFFN(RivalFFN):
    """Transformers' Mixtral experts behind our top-k router, which leaves the same trace. Padding takes part, as there."""

    def __init__(self, layer: MoELayer, implementation: str) -> None:
        super().__init__(layer.router)
        build = {"eager": rivals.transformers_eager, "grouped_mm": rivals.transformers_grouped_mm}[implementation]
        block: Any = build(_problem_of(layer))
        self.experts: nn.Module = block.block.experts
        self.shared_experts = layer.shared_experts
        self.site = layer.site

    def forward(
        self, x_BSD: Tensor, context: RoutingContext | None = None, trace: RoutingTrace | None = None
    ) -> Tensor:
        context = context or RoutingContext.all_language((x_BSD.shape[0], x_BSD.shape[1]), x_BSD.device)
        x_TD = x_BSD.flatten(0, 1)
        decision = self.router(x_TD, context)
        if trace is not None:
            trace.record(self.site, decision)
        out_TD = self.experts(x_TD, decision.expert_ids_RK, decision.weights_RK)
        for expert in self.shared_experts or ():
            out_TD = out_TD + expert(x_TD)
        return out_TD.view_as(x_BSD)


class MoELlavaFFN(RivalFFN):
    """DeepSpeed's layer as MoE-LLaVA runs it: top-2 with capacity 1.5, rows moved by products with [T, E, C].

    Its modules are taken out of DeepSpeed's MoE, since at one process an expert is a parameter like any other.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__(_NoRouter())
        moe = rivals.DeepSpeedEinsum(_problem_of(layer)).moe.deepspeed_moe
        self.gate: Any = moe.gate
        self.experts: nn.Module = moe.experts
        self.shared_experts = layer.shared_experts
        for parameter in self.experts.parameters():
            del parameter.allreduce, parameter.group_name

    def forward(
        self, x_BSD: Tensor, context: RoutingContext | None = None, trace: RoutingTrace | None = None
    ) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        self.auxiliary, combine_TEC, dispatch_TEC, _ = self.gate(x_TD, None)
        self.dropped = self.gate.k * x_TD.shape[0] - dispatch_TEC.detach().sum()
        rows_ECD = torch.einsum("sec,sm->ecm", dispatch_TEC.type_as(x_TD), x_TD)
        out_ECD = self.experts(rows_ECD[None])[0]
        out_TD = torch.einsum("sec,ecm->sm", combine_TEC.type_as(x_TD), out_ECD)
        for expert in self.shared_experts or ():
            out_TD = out_TD + expert(x_TD)
        return out_TD.view_as(x_BSD)


def put_in(model: VLM, kind: str) -> None:
    """Replace every MoE layer of the language model, in place. kind: masked, transformers_eager,
    transformers_grouped_mm or moe_llava. What is trained stays what it was: experts and routers, or neither.

    Raises:
        UnavailableError: a layer that the other stack does not have.
    """
    for layer in model.modules():
        if not isinstance(layer, MoEDecoderLayer):
            continue
        ours = layer.mlp
        if kind == "masked":
            ours.router = AllExpertsRouter(ours.router)
            continue
        trains_experts, trains_router = (_is_trained(part) for part in (ours.experts, ours.router))
        rival: RivalFFN
        if kind == "moe_llava":
            rival = MoELlavaFFN(ours)
            rival.gate.requires_grad_(trains_router)
        else:
            rival = TransformersFFN(ours, kind.removeprefix("transformers_"))
        rival.experts.requires_grad_(trains_experts)
        layer.mlp = rival.train(ours.training)  # type: ignore[assignment]


def rival_layers(model: nn.Module) -> list[RivalFFN]:
    """The layers that `put_in` made."""
    return [module for module in model.modules() if isinstance(module, RivalFFN)]


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _problem_of(layer: MoELayer) -> Problem:
    """The layer's weights as the layer benchmark's rivals take them; its data are of no account."""
    experts: Experts = layer.experts
    if experts.w3 is None or experts.b1 is not None or experts.activation != "silu":
        raise UnavailableError("its experts are SwiGLU without biases, this model's are not")
    if layer.adapters is not None:
        raise UnavailableError("its experts take no adapters")
    gate = getattr(layer.router, "gate", None)
    weight = None if gate is None else getattr(gate, "weight", None)
    if weight is None or weight.shape != (experts.num_experts, experts.w1.shape[2]):
        raise UnavailableError("its gate is one matrix on the token, this router's is not")
    num_experts, ffn_width, model_width = experts.w1.shape
    nothing_BSD = experts.w1.new_empty(1, 1, model_width)
    context = RoutingContext.all_language((1, 1), nothing_BSD.device)
    return Problem(
        sizes=Sizes(
            tokens=1,
            model_width=model_width,
            ffn_width=ffn_width,
            experts=num_experts,
            top_k=layer.router.top_k,
            tail_share=0.0,
            capacity_factor=CAPACITY,
        ),
        gate_ED=weight.detach(),
        w1_EFD=experts.w1.detach(),
        w2_EDF=experts.w2.detach(),
        w3_EFD=experts.w3.detach(),
        x_BSD=nothing_BSD,
        grad_BSD=nothing_BSD,
        context=context,
    )
