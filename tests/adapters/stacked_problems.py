"""MoE layers whose experts' stacks are adapted, and contexts for them.

B batch   S sequence   T tokens   D model width   F FFN width   E MoE experts   K slots of a token
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe_lvlm.adapters import adapted_linears
from moe_lvlm.adapters.facts import BatchFacts
from moe_lvlm.adapters.stacked import adapt_stack
from moe_lvlm.config.adapter import LoRASettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing import RoutingContext, RoutingTrace, Site
from moe_lvlm.routing.build import build_router
from tests.adapters.problems import (
    WIDTH,
    mocle,
    rows_context,
    shake_adapters,
)

D, F, E = 6, 5, 4
LENGTHS, SEQUENCE = [7, 3, 5, 6], 7
STACKS = ("w1", "w2", "w3")
SITE = Site("language_model", 3)
KINDS: dict[str, LoRASettings] = {
    "cluster": mocle(),
    "no universal": mocle(has_universal=False),
    "top-2": mocle(has_universal=False, top_k=2),
    "dataset": mocle(gating="dataset"),
    "sentence": mocle(gating="sentence"),
    "token": mocle(gating="token"),
    "token top-2": mocle(gating="token", has_universal=False, top_k=2),
    "rslora": mocle(rslora=True),
    "released": mocle(compat="released"),
    "one expert": mocle(num_experts=1),
    "lora": LoRASettings(rank=2, alpha=3.0),
}
every_kind = pytest.mark.parametrize("settings", list(KINDS.values()), ids=list(KINDS))


def make_layer(
    settings: LoRASettings, stacks: tuple[str, ...] = STACKS, *, has_bias: bool = False, is_gated: bool = True
) -> MoELayer:
    """A float64 MoE layer of four experts, of which the last gets no token, top-2, with adapters that do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MoEConfig.model_validate({"num_experts": E, "top_k": 2, "router": {"kind": "top_k"}})
        router = build_router(model_width=D, config=config)
        experts = Experts(
            num_experts=E, model_width=D, ffn_width=F, activation="silu", is_gated=is_gated, has_bias=has_bias
        )
        for parameter in (*router.parameters(), *experts.parameters()):
            nn.init.normal_(parameter)
        with torch.no_grad():
            # far below the others' scores, since the first number of every token is 3
            router.gate.weight[E - 1] = 0
            router.gate.weight[E - 1, 0] = -100
        layer = MoELayer(router=router, experts=experts, site=SITE).double()
        for name in stacks:
            adapt_stack(layer, name, settings, Site(f"adapter.mlp.experts.{name}", 3))
    shake_adapters(layer)
    return layer.eval()


def hidden(context: RoutingContext, *, seed: int = 0) -> Tensor:
    shape = (*context.sample_BS.shape, D)
    x_BSD = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_BSD[..., 0] = 3
    return x_BSD.requires_grad_()


def packed_context() -> RoutingContext:
    """Rows of several samples, with padding between and behind."""
    sample_BS = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [2, 2, -1, 3, 3, 3, 3]], dtype=torch.int32)
    instruction_BS = torch.tensor([[1, 0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    context = rows_context([7, 7], SEQUENCE)
    return replace(
        context,
        modality_BS=(sample_BS >= 0).to(torch.int8),
        sample_BS=sample_BS,
        num_samples=4,
        instruction_BS=instruction_BS,
        cluster_N=torch.tensor([4, 0, 2, 1]),
        dataset_N=torch.tensor([1, 0, 1, 0]),
        draw_N=torch.arange(4),
        is_packed=True,
    )


CONTEXTS: dict[str, Callable[[], RoutingContext]] = {
    "rows": lambda: rows_context(LENGTHS, SEQUENCE),
    "left": lambda: rows_context(LENGTHS, SEQUENCE, left=True),
    "packed": packed_context,
}


def table_rows(*, seed: int = 7) -> Tensor:
    rows_NG = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows_NG.requires_grad_()


def call(layer: MoELayer, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingTrace]:
    trace = RoutingTrace(context)
    facts = BatchFacts(context, trace)
    for _, adapter in adapted_linears(layer):
        adapter.facts = facts
    out_BSD = layer(x_BSD, context, trace)
    for _, adapter in adapted_linears(layer):
        adapter.facts = None
    return out_BSD, trace
