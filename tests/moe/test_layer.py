"""The MoE layer: router, dispatch, experts and combine together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, Site

WIDTH = 8


def make_layer(*, shared: int = 0, **moe: Any) -> MoELayer:
    torch.manual_seed(0)
    config = MoEConfig.model_validate({"num_experts": 4, "top_k": 2, "shared_experts": shared, **moe})
    experts = Experts(num_experts=4, model_width=WIDTH, ffn_width=6, activation="silu")
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return MoELayer(
        router=build_router(model_width=WIDTH, config=config),
        experts=experts,
        site=Site("language_model", 3),
        shared_experts=nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(shared)) if shared else None,
    )


def hidden(batch: int = 2, sequence: int = 3) -> Tensor:
    return torch.randn(batch, sequence, WIDTH, generator=torch.Generator().manual_seed(1))


def context_with_padding() -> RoutingContext:
    modality = torch.tensor([[1, 2, 0], [2, 2, 1]], dtype=torch.int8)
    return RoutingContext(
        modality_BS=modality,
        image_BS=torch.where(modality == int(Modality.VISION), torch.tensor([[0], [1]]), -1).to(torch.int32),
        sample_BS=torch.tensor([[0, 0, -1], [1, 1, 1]], dtype=torch.int32),
    )


def test_output_is_the_weighted_sum_of_the_chosen_experts() -> None:
    layer, x = make_layer(), hidden()
    out = layer(x, context_with_padding())
    w3 = layer.experts.get_parameter("w3")
    for row, column in ((0, 0), (0, 1), (1, 2)):
        token = x[row, column]
        probs = (layer.router.gate.weight @ token).softmax(dim=0)
        best = probs.sort(descending=True).indices[:2]
        expected = torch.zeros(WIDTH)
        for expert in best.tolist():
            up = nn.functional.silu(layer.experts.w1[expert] @ token) * (w3[expert] @ token)
            expected = expected + probs[expert] / probs[best].sum() * (layer.experts.w2[expert] @ up)
        assert_close(out[row, column], expected, atol=1e-5, rtol=1e-5)
    assert out[0, 2].abs().sum() == 0  # padding


def test_shared_experts_are_added_with_weight_one() -> None:
    layer, x = make_layer(shared=2), hidden()
    assert layer.shared_experts is not None
    with_shared = layer(x, context_with_padding())
    expected = sum(expert(x) for expert in layer.shared_experts)
    layer.shared_experts = None
    assert_close(with_shared - layer(x, context_with_padding()), expected, atol=1e-5, rtol=1e-5)


def test_without_a_context_every_token_is_language() -> None:
    layer = make_layer(router={"kind": "ltdr"})
    trace = RoutingTrace(RoutingContext.all_language((2, 3), torch.device("cpu")))
    out = layer(hidden(), None, trace)
    assert_close(out, layer(hidden(), trace.context))
    assert trace[Site("language_model", 3)].keep_RK.sum(dim=-1).tolist() == [2] * 6


def test_decision_goes_to_the_trace_under_the_site() -> None:
    layer, context = make_layer(), context_with_padding()
    trace = RoutingTrace(context)
    layer(hidden(), context, trace)
    assert [site for site, _ in trace.items()] == [Site("language_model", 3)]
    assert trace[Site("language_model", 3)].weights_RK.requires_grad


def test_output_does_not_depend_on_the_trace() -> None:
    layer, context = make_layer(), context_with_padding()
    trace = RoutingTrace(context)
    trace.record(layer.site, copy.copy(layer.router(hidden().flatten(0, 1) * 5, context)))
    assert torch.equal(layer(hidden(), context, trace), layer(hidden(), context))


@pytest.mark.parametrize(("batch", "sequence"), [(2, 4), (1, 3), (4, 3)])
def test_context_of_other_tokens_is_refused(batch: int, sequence: int) -> None:
    with pytest.raises(ValueError, match=r"routing context of shape \(2, 3\) for hidden states of shape"):
        make_layer()(hidden(batch, sequence), context_with_padding())


@pytest.mark.parametrize(("batch", "sequence"), [(3, 2), (1, 6)])
def test_context_of_another_shape_with_as_many_tokens_is_refused(batch: int, sequence: int) -> None:
    with pytest.raises(ValueError, match=r"routing context of shape \(2, 3\) for hidden states of shape"):
        make_layer()(hidden(batch, sequence), context_with_padding())


def test_bf16_layer_gives_bf16() -> None:
    layer = make_layer().bfloat16()
    out = layer(hidden().bfloat16(), context_with_padding())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
