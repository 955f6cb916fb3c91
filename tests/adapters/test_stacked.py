"""Adapters on the stacked matrices of experts beside a loop by hand over tokens and experts.

B batch   S sequence   T tokens   D model width   F FFN width   E MoE experts   K slots of a token
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close

from moe_lvlm.adapters.linear import AdaptedLinear
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing import RoutingContext, RoutingDecision, RoutingTrace, Site
from tests.adapters.problems import (
    mocle,
    plain_gates,
    rows_context,
    with_table,
)
from tests.adapters.stacked_problems import (
    CONTEXTS,
    KINDS,
    LENGTHS,
    SEQUENCE,
    SITE,
    STACKS,
    D,
    E,
    call,
    every_kind,
    hidden,
    make_layer,
    table_rows,
)


def plain_delta(adapter: AdaptedLinear, expert: int, choice: list[tuple[int, Tensor]]) -> Tensor:
    """The matrix [O, I] that is added to that of a MoE expert, from dense products; gates and scale are float32."""
    settings = adapter.settings
    scale = settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)
    if not isinstance(settings, MoCLESettings):
        return scale * adapter.lora_B[expert, 0] @ adapter.lora_A[expert, 0]
    delta_OI = torch.zeros(adapter.lora_B.shape[2], adapter.lora_A.shape[3], dtype=torch.float64)
    for chosen, gate in choice:
        weight = gate**2 if settings.compat == "released" else gate
        weight = (weight * scale).double()
        delta_OI = delta_OI + weight * adapter.lora_B[expert, chosen] @ adapter.lora_A[expert, chosen]
    if settings.has_universal:
        ((_, gate),) = choice
        weight = ((1 - gate) * scale).double()
        delta_OI = delta_OI + weight * adapter.lora_B[expert, -1] @ adapter.lora_A[expert, -1]
    return delta_OI


def plain_layer(layer: MoELayer, x_BSD: Tensor, context: RoutingContext, trace: RoutingTrace) -> Tensor:
    """The same layer token by token, expert by expert, W + delta as one dense matrix. What the router and the gates
    decided is read from the trace, and is looked at by itself in another test."""
    x_TD = x_BSD.flatten(0, 1)
    routed = trace[SITE].by_token(context)
    chosen: dict[str, RoutingDecision] = {
        site.part.rpartition(".")[2]: decision.by_token(context)
        for site, decision in trace.items()
        if site.part != SITE.part
    }

    def apply(name: str, expert: int, token: int, x_I: Tensor) -> Tensor:
        matrix_OI = layer.experts.get_parameter(name)[expert]
        if name in layer.adapters:
            decision = chosen.get(name)
            choice = (
                []
                if decision is None
                else list(zip(decision.expert_ids_RK[token].tolist(), decision.weights_RK[token], strict=True))
            )
            matrix_OI = matrix_OI + plain_delta(layer.adapters[name], expert, choice)
        bias = getattr(layer.experts, f"b{name[1]}")
        return matrix_OI @ x_I if bias is None else matrix_OI @ x_I + bias[expert]

    out = []
    for token, x_D in enumerate(x_TD):
        total_D = torch.zeros(D, dtype=torch.float64)
        for slot in range(2):
            if routed.keep_RK[token, slot]:
                expert = int(routed.expert_ids_RK[token, slot])
                hidden_F = silu(apply("w1", expert, token, x_D))
                if layer.experts.w3 is not None:
                    hidden_F = hidden_F * apply("w3", expert, token, x_D)
                total_D = total_D + routed.weights_RK[token, slot].double() * apply("w2", expert, token, hidden_F)
        out.append(total_D)
    return torch.stack(out).view_as(x_BSD)


def assert_equals_plain_layer(layer: MoELayer, context: RoutingContext) -> None:
    """Output and every gradient: of x, the table's rows, routers, experts, LoRA experts and gates."""
    x_BSD, rows_NG = hidden(context), table_rows()
    context = with_table(context, rows_NG)
    out_BSD, trace = call(layer, x_BSD, context)
    expected_BSD = plain_layer(layer, x_BSD, context, trace)
    assert_close(out_BSD, expected_BSD, atol=1e-11, rtol=1e-11)
    assert torch.equal(out_BSD[context.sample_BS < 0], torch.zeros(int((context.sample_BS < 0).sum()), D).double())

    inputs = {"x": x_BSD, "table": rows_NG, **dict(layer.named_parameters())}
    upstream = torch.randn(out_BSD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, expected = (
        torch.autograd.grad(out, list(inputs.values()), upstream, retain_graph=True, allow_unused=True)
        for out in (out_BSD, expected_BSD)
    )
    for name, one, other in zip(inputs, found, expected, strict=True):
        # gates and routers decide in float32, and their gradients are summed in it
        is_exact = any(part in name for part in ("experts.", "lora_"))
        tolerance = {"atol": 1e-10, "rtol": 1e-10} if is_exact else {"atol": 1e-5, "rtol": 1e-5}
        assert (one is None) == (other is None), name
        if one is not None:
            assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    moving = {name for name, gradient in zip(inputs, found, strict=True) if gradient is not None and gradient.any()}
    assert all(f"adapters.{stack}.lora_{matrix}" in moving for stack in layer.adapters for matrix in "AB")
    # the expert that got no token: a gradient, and it is 0
    starved = dict(zip(inputs, found, strict=True))
    for stack in layer.adapters:
        assert not starved[f"adapters.{stack}.lora_A"][E - 1].any()
        assert starved[f"adapters.{stack}.lora_A"][:2].any()
    decisions = [decision for site, decision in trace.items() if site != SITE]
    if any(decision.probs_RE.shape[1] > 1 for decision in decisions):
        assert any(len({tuple(ids) for ids in decision.expert_ids_RK.tolist()}) > 1 for decision in decisions)


@pytest.mark.parametrize("context", list(CONTEXTS.values()), ids=list(CONTEXTS))
@every_kind
def test_equals_a_loop_over_tokens_and_experts(settings: LoRASettings, context: Callable[[], RoutingContext]) -> None:
    assert_equals_plain_layer(make_layer(settings), context())


@pytest.mark.parametrize("stacks", [("w2",), ("w1", "w3"), ("w2", "w3")], ids="-".join)
@pytest.mark.parametrize("kind", ["cluster", "token top-2", "lora"])
def test_some_stacks(kind: str, stacks: tuple[str, ...]) -> None:
    assert_equals_plain_layer(make_layer(KINDS[kind], stacks), rows_context(LENGTHS, SEQUENCE))


@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "not gated"])
def test_biases(is_gated: bool) -> None:
    stacks = STACKS if is_gated else ("w1", "w2")
    layer = make_layer(mocle(), stacks, has_bias=True, is_gated=is_gated)
    assert_equals_plain_layer(layer, rows_context(LENGTHS, SEQUENCE))


@pytest.mark.parametrize("kind", ["cluster", "dataset", "sentence", "token", "released", "top-2"])
def test_what_gates_read(kind: str) -> None:
    """The table's row, the mean of the instruction at the MoE layer's input, or the token there, for every stack, that of
    w2 too."""
    settings = KINDS[kind]
    assert isinstance(settings, MoCLESettings)
    layer, context = make_layer(settings), with_table(rows_context(LENGTHS, SEQUENCE), table_rows())
    x_BSD = hidden(context)
    _, trace = call(layer, x_BSD, context)
    for name in STACKS:
        gated = layer.adapters[name]
        decision = trace[Site(f"adapter.mlp.experts.{name}", 3)]
        assert decision.level == ("token" if kind == "token" else "sample")
        for sample, length in enumerate(LENGTHS):
            for place in range(length if kind == "token" else 1):
                if kind == "token":
                    read_G = x_BSD[sample, place]
                elif kind == "sentence":
                    read_G = x_BSD[sample, :2].mean(dim=0)
                elif kind == "released":
                    read_G = gated.table.weight[context.cluster_N[sample]]
                else:
                    read_G = context.embedding_NG[sample]
                scores_E = gated.gate.weight.double() @ read_G
                scores_E = scores_E + gated.gate.bias if kind == "released" else scores_E
                row = sample * SEQUENCE + place if kind == "token" else sample
                gates_E = torch.zeros(settings.num_experts)
                gates_E[decision.expert_ids_RK[row]] = decision.weights_RK[row].detach()
                assert_close(gates_E.double(), plain_gates(scores_E.detach(), settings), atol=1e-5, rtol=1e-5)


def test_experts_that_no_row_uses_are_not_computed() -> None:
    """They hold what is not a number, and nothing of it comes out or comes back."""
    layer, context = make_layer(mocle()), with_table(rows_context(LENGTHS, SEQUENCE), table_rows())
    _, trace = call(layer, hidden(context), context)
    routed = trace[SITE].by_token(context)
    num_unused = 0
    for name in STACKS:
        adapter = layer.adapters[name]
        ids_T = trace[adapter.site].by_token(context).expert_ids_RK[:, 0]
        used = {
            (int(routed.expert_ids_RK[token, slot]), int(ids_T[token]))
            for token, slot in routed.keep_RK.nonzero().tolist()
        }
        unused = {(expert, chosen) for expert in range(E) for chosen in range(3)} - used
        assert {(E - 1, chosen) for chosen in range(3)} <= unused
        num_unused += len(unused)
        for expert, chosen in unused:
            adapter.lora_A.data[expert, chosen] = torch.nan
            adapter.lora_B.data[expert, chosen] = torch.nan
    assert num_unused > 3 * 3
    x_BSD = hidden(context)
    out_BSD, _ = call(layer, x_BSD, context)
    assert torch.isfinite(out_BSD).all()
    out_BSD.sum().backward()
    assert torch.isfinite(x_BSD.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_equal_experts_with_the_universal_one_are_one_lora() -> None:
    several, one = make_layer(mocle()), make_layer(KINDS["lora"])
    for name in STACKS:
        for matrix in ("lora_A", "lora_B"):
            single = getattr(one.adapters[name], matrix).data
            getattr(several.adapters[name], matrix).data.copy_(single.expand(-1, 4, -1, -1))
    context = with_table(rows_context(LENGTHS, SEQUENCE), table_rows())
    x_BSD = hidden(context)
    assert_close(call(several, x_BSD, context)[0], call(one, x_BSD, context)[0], atol=1e-6, rtol=1e-6)


def test_dropout_is_on_what_a_reads() -> None:
    """With everything dropped the experts are what they were; outside training nothing is dropped."""
    layer, context = make_layer(mocle(dropout=0.999999)), with_table(rows_context(LENGTHS, SEQUENCE), table_rows())
    plain = copy.deepcopy(layer)
    plain.adapters = None
    x_BSD = hidden(context)
    assert (call(layer, x_BSD, context)[0] - plain(x_BSD, context)).abs().max() > 0.1
    layer.train()
    noiseless = replace(context, draw_N=torch.arange(4))
    assert_close(call(layer, x_BSD, noiseless)[0], plain(x_BSD, context))


def test_outside_a_decoder_layer() -> None:
    layer = make_layer(mocle())
    with pytest.raises(ValueError, match=r"adapter\.mlp\.experts\.w1 of layer 3 was called outside its decoder layer"):
        layer(torch.randn(2, 3, D, dtype=torch.float64))
