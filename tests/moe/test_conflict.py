"""Gradient conflicts found in the experts' backward pass, against gradients of single rows made one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe.dispatch import LocalDispatcher
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.moe.types import ExpertRows
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, Site
from tests.moe.tables import run_layer, sorted_rows

WIDTH, FFN_WIDTH, EXPERTS = 5, 7, 4
# rows of each expert and rank; expert 1 has none, expert 3 none of the first rank
COUNTS_BY_SOURCE = ((3, 4), (0, 0), (5, 1), (0, 4))
COUNTS = (7, 0, 6, 4)


def make_experts(*, is_gated: bool = True, has_bias: bool = True) -> Experts:
    experts = Experts(
        num_experts=EXPERTS,
        model_width=WIDTH,
        ffn_width=FFN_WIDTH,
        activation="silu",
        is_gated=is_gated,
        has_bias=has_bias,
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_rows(counts_by_source: tuple[tuple[int, ...], ...] | None = None) -> ExpertRows:
    num_rows = sum(COUNTS)
    x_RD = draw(num_rows, WIDTH).requires_grad_()
    weights_R = draw(num_rows, seed=2).abs()
    rows = sorted_rows(x_RD, weights_R, COUNTS, counts_by_source, torch.zeros(num_rows))
    assert rows.probe_NK is not None
    # leaves
    return rows._replace(weights_NK=rows.weights_NK.requires_grad_(), probe_NK=rows.probe_NK.requires_grad_())


def row_gradient(experts: Experts, expert: int, x_D: Tensor, weight: Tensor, grad_D: Tensor) -> Tensor:
    """One row's gradient on all parameters of its expert, as one vector."""
    parameters = {name: stack[expert].detach().requires_grad_() for name, stack in experts.named_parameters()}
    hidden = parameters["w1"] @ x_D + parameters.get("b1", 0)
    hidden = functional.silu(hidden)
    if "w3" in parameters:
        hidden = hidden * (parameters["w3"] @ x_D + parameters.get("b3", 0))
    out_D = weight * (parameters["w2"] @ hidden + parameters.get("b2", 0))
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(out_D @ grad_D, list(parameters.values()))])


def cosines(experts: Experts, rows: ExpertRows, grad_RD: Tensor) -> Tensor:
    """Cosine of each row's gradient with the mean over the rows of the same expert and rank."""
    parts = rows.counts_by_source or tuple((count,) for count in rows.plan.host_counts)
    found, start = [], 0
    for expert, counts in enumerate(parts):
        for count in counts:
            grads = [
                row_gradient(experts, expert, rows.x_ND[row].detach(), rows.weights_NK[row, 0].detach(), grad_RD[row])
                for row in range(start, start + count)
            ]
            if grads:
                mean = torch.stack(grads).mean(dim=0)
                found += [functional.cosine_similarity(grad, mean, dim=0) for grad in grads]
            start += count
    return torch.stack(found).float()


@pytest.mark.parametrize("counts_by_source", [None, COUNTS_BY_SOURCE], ids=["one rank", "two ranks"])
@pytest.mark.parametrize(("is_gated", "has_bias"), list(itertools.product((True, False), (True, False))))
def test_the_probe_is_answered_with_the_cosine_of_each_row(
    is_gated: bool, has_bias: bool, counts_by_source: tuple[tuple[int, ...], ...] | None
) -> None:
    experts, rows = make_experts(is_gated=is_gated, has_bias=has_bias), make_rows(counts_by_source)
    grad_RD = draw(*rows.x_ND.shape, seed=3)
    experts(rows).backward(grad_RD)
    assert rows.probe_NK is not None and rows.probe_NK.grad is not None
    expected = cosines(experts, rows, grad_RD)
    assert_close(rows.probe_NK.grad[:, 0], expected, atol=1e-6, rtol=1e-5)
    assert expected.min() < 0.1 and expected.max() > 0.8


def test_cosines_by_hand() -> None:
    """An expert that hands positive rows on, w2 relu(w1 x) with w1 = w2 = 1. All rows are (1, 1): a row's gradient is
    its output's gradient, in both columns of both matrices, so the cosines are those of the output's gradients."""
    experts = Experts(num_experts=1, model_width=2, ffn_width=2, activation="relu", is_gated=False)
    with torch.no_grad():
        experts.w1[0], experts.w2[0] = torch.eye(2), torch.eye(2)
    probe_R = torch.zeros(4).requires_grad_()
    out_RD = experts(sorted_rows(torch.ones(4, 2), torch.ones(4), (4,), None, probe_R))
    # sum: (2, 1), of length sqrt(5)
    out_RD.backward(torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]))
    root = 5**0.5
    # the last has no gradient, so it has no conflict either
    assert_close(probe_R.grad, torch.tensor([2 / root, 1 / root, -2 / root, 1.0]))


@pytest.mark.parametrize("counts_by_source", [None, COUNTS_BY_SOURCE], ids=["one rank", "two ranks"])
def test_the_probe_leaves_output_and_other_gradients_alone(
    counts_by_source: tuple[tuple[int, ...], ...] | None,
) -> None:
    experts, rows = make_experts(), make_rows(counts_by_source)
    grad_RD = draw(*rows.x_ND.shape, seed=3)
    wanted = [rows.x_ND, rows.weights_NK, *experts.parameters()]
    plain_RD, probed_RD = experts(rows._replace(probe_NK=None)), experts(rows)
    assert_close(plain_RD, probed_RD, atol=1e-12, rtol=1e-12)
    expected = torch.autograd.grad(plain_RD, wanted, grad_RD)
    for grad, value in zip(torch.autograd.grad(probed_RD, wanted, grad_RD), expected, strict=True):
        assert_close(grad, value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("frozen", [("w1",), ("w2", "b3"), ("w1", "w2", "w3", "b1", "b2", "b3")])
@pytest.mark.parametrize("counts_by_source", [None, COUNTS_BY_SOURCE], ids=["one rank", "two ranks"])
def test_frozen_parameters_count(frozen: tuple[str, ...], counts_by_source: tuple[tuple[int, ...], ...] | None) -> None:
    experts, rows = make_experts(), make_rows(counts_by_source)
    grad_RD = draw(*rows.x_ND.shape, seed=3)
    for name in frozen:
        experts.get_parameter(name).requires_grad_(False)
    experts(rows).backward(grad_RD)
    assert rows.probe_NK is not None and rows.probe_NK.grad is not None
    assert_close(rows.probe_NK.grad[:, 0], cosines(experts, rows, grad_RD), atol=1e-6, rtol=1e-5)
    assert all((experts.get_parameter(name).grad is None) == (name in frozen) for name, _ in experts.named_parameters())


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_the_scale_of_the_loss_changes_no_cosine(scale: float) -> None:
    experts, rows = make_experts(), make_rows()
    grad_RD = draw(*rows.x_ND.shape, seed=3)
    expected = cosines(experts, rows, grad_RD)
    experts.float()(rows).backward((scale * grad_RD).float())
    assert rows.probe_NK is not None and rows.probe_NK.grad is not None
    assert_close(rows.probe_NK.grad[:, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**9)])
def test_half_precision_is_close(dtype: torch.dtype, scale: float) -> None:
    """2^9: squares and products of such gradients are no numbers of float16."""
    experts, rows = make_experts(), make_rows()
    rows = rows._replace(x_ND=rows.x_ND.detach().to(dtype), weights_NK=rows.weights_NK.detach().float())
    grad_RD = draw(*rows.x_ND.shape, seed=3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter.to(dtype))
    expected = cosines(experts, rows._replace(x_ND=rows.x_ND.double()), grad_RD)
    experts.to(dtype)(rows).backward((scale * grad_RD).to(dtype))
    assert rows.probe_NK is not None and rows.probe_NK.grad is not None
    assert_close(rows.probe_NK.grad[:, 0], expected, atol=0.02, rtol=0)


def test_no_row_at_all() -> None:
    experts = make_experts()
    none = torch.zeros(0)
    rows = sorted_rows(none.double()[:, None].expand(0, WIDTH), none, (0,) * 4, None, none.clone().requires_grad_())
    experts(rows).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in experts.parameters())


def make_layer(*, kind: str = "stgc", top_k: int = 2, **router: Any) -> MoELayer:
    config = MoEConfig.model_validate({"num_experts": EXPERTS, "top_k": top_k, "router": {"kind": kind, **router}})
    torch.manual_seed(0)
    layer = MoELayer(
        router=build_router(model_width=WIDTH, config=config), experts=make_experts(), site=Site("language_model", 0)
    )
    with torch.no_grad():
        layer.router.gate.weight.mul_(30)
    return layer


def make_context() -> RoutingContext:
    """Two rows of 7, each an image of 3 tokens and text; the second ends in padding."""
    kinds = {"V": Modality.VISION, "L": Modality.LANGUAGE, ".": Modality.PADDING}
    modality = torch.tensor([[int(kinds[mark]) for mark in row] for row in ("VVVLLLL", "VVVLL..")], dtype=torch.int8)
    return RoutingContext(
        modality_BS=modality,
        image_BS=torch.where(modality == int(Modality.VISION), torch.tensor([[0], [1]]), -1).to(torch.int32),
        sample_BS=torch.where(modality == int(Modality.PADDING), -1, torch.tensor([[0], [1]])).to(torch.int32),
    )


NUM_TOKENS = 12


def test_the_gradient_of_the_conflict_loss_equals_a_brute_force_loss() -> None:
    """With the conflicts found row by row, the loss is an ordinary differentiable one."""
    threshold, coefficient = 0.1, 3.0
    layer, context = make_layer(threshold=threshold, coefficient=coefficient), make_context()
    x_BSD, grad_BSD = draw(2, 7, WIDTH).requires_grad_(), draw(2, 7, WIDTH, seed=4)
    trace = RoutingTrace(context)
    out_BSD = layer(x_BSD, context, trace)
    decision = trace[layer.site]
    assert decision.penalty is not None and decision.conflict_RK is not None
    assert decision.penalty == 0
    assert not decision.conflict_RK.any()
    ((out_BSD * grad_BSD).sum() + decision.penalty).backward()
    wanted = {"x": x_BSD, **dict(layer.named_parameters())}
    grads = {name: tensor.grad for name, tensor in wanted.items()}

    plain = make_layer(kind="top_k")
    x_BSD = x_BSD.detach().requires_grad_()
    trace = RoutingTrace(context)
    out_BSD = plain(x_BSD, context, trace)
    choice = trace[plain.site]
    conflict_TK = torch.zeros_like(choice.keep_RK)
    for expert in range(EXPERTS):
        places = ((choice.expert_ids_RK == expert) & choice.keep_RK).nonzero().tolist()
        row_grads = [
            row_gradient(
                plain.experts,
                expert,
                x_BSD.flatten(0, 1)[token].detach(),
                choice.weights_RK[token, slot].detach(),
                grad_BSD.flatten(0, 1)[token],
            )
            for token, slot in places
        ]
        for (token, slot), grad in zip(places, row_grads, strict=True):
            cosine = functional.cosine_similarity(grad, torch.stack(row_grads).mean(dim=0), dim=0)
            conflict_TK[token, slot] = cosine < threshold
    assert 0 < conflict_TK.sum() < choice.keep_RK.sum()
    assert torch.equal(decision.conflict_RK, conflict_TK)
    loss = choice.logits_RE.new_zeros(())
    for token, slot in conflict_TK.nonzero().tolist():
        loss = loss - (-choice.logits_RE[token]).softmax(dim=-1)[choice.expert_ids_RK[token, slot]].log()
    ((out_BSD * grad_BSD).sum() + coefficient * loss / NUM_TOKENS).backward()
    expected = {"x": x_BSD.grad, **{name: parameter.grad for name, parameter in plain.named_parameters()}}
    for name, grad in grads.items():
        assert_close(grad, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def backward_of(layer: MoELayer, *, is_checkpointed: bool = False, scale: float = 1.0) -> tuple[dict[str, Tensor], Any]:
    """Gradients of a loss with the penalty in it, and the decision."""
    context = make_context()
    x_BSD, trace = draw(2, 7, WIDTH).requires_grad_(), RoutingTrace(context)
    if is_checkpointed:
        out_BSD = checkpoint(layer, x_BSD, context, trace, use_reentrant=False)
    else:
        out_BSD = layer(x_BSD, context, trace)
    decision = trace[layer.site]
    loss = (out_BSD * draw(2, 7, WIDTH, seed=4)).sum()
    (scale * (loss if decision.penalty is None else loss + decision.penalty)).backward()
    grads = {"x": x_BSD.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    return {name: grad for name, grad in grads.items() if grad is not None}, decision


def test_checkpointing_changes_nothing() -> None:
    plain, decision = backward_of(make_layer(coefficient=1.0))
    checkpointed, other = backward_of(make_layer(coefficient=1.0), is_checkpointed=True)
    assert plain.keys() == checkpointed.keys() > {"x", "router.gate.weight"}
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)
    assert decision.conflict_RK.any()
    assert torch.equal(other.conflict_RK, decision.conflict_RK)


def test_the_gradient_scales_with_the_loss() -> None:
    plain, _ = backward_of(make_layer(coefficient=1.0))
    for name, grad in backward_of(make_layer(coefficient=1.0), scale=0.25)[0].items():
        assert_close(grad, plain[name] * 0.25, msg=name)


def test_coefficient_zero_is_plain_top_k_and_still_counts() -> None:
    plain, _ = backward_of(make_layer(kind="top_k"))
    counted, decision = backward_of(make_layer(coefficient=0))
    for name, value in plain.items():
        assert_close(counted[name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert decision.conflict_RK.any()


def test_a_higher_threshold_finds_more() -> None:
    found = [backward_of(make_layer(threshold=threshold))[1] for threshold in (-1, -0.2, 0, 0.3, 1)]
    counts = [int(decision.conflict_RK.sum()) for decision in found]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[2] < counts[3]
    # all but lone rows of an expert, whose cosine is 1 but for rounding
    assert counts[-1] > NUM_TOKENS
    assert not any((decision.conflict_RK & ~decision.keep_RK).any() for decision in found)


def test_without_a_way_to_the_experts_nothing_is_in_conflict() -> None:
    """A loss of the router alone: the experts' backward pass does not run."""
    layer, context, trace = make_layer(threshold=0.5), make_context(), RoutingTrace(make_context())
    layer(draw(2, 7, WIDTH), context, trace)
    decision = trace[layer.site]
    (decision.logits_RE.sum() + decision.penalty).backward()
    assert decision.conflict_RK is not None
    assert not decision.conflict_RK.any()


def test_a_frozen_router_over_frozen_states_asks_for_nothing() -> None:
    layer = make_layer()
    layer.router.requires_grad_(False)
    trace = RoutingTrace(make_context())
    layer(draw(2, 7, WIDTH), make_context(), trace).sum().backward()
    decision = trace[layer.site]
    assert decision.conflict_RK is not None and not decision.conflict_RK.any()
    assert layer.experts.w1.grad is not None


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_training_parts_tokens_whose_gradients_point_apart(coefficient: float) -> None:
    """Six tokens of one kind and three of another, all at the first of two equal experts, where the six pull it one way
    and the three the other way. The loss, and nothing else, sends the three to the second expert."""
    config = MoEConfig.model_validate(
        {"num_experts": 2, "top_k": 1, "router": {"kind": "stgc", "coefficient": coefficient}}
    )
    router = build_router(model_width=3, config=config)
    experts = Experts(num_experts=2, model_width=3, ffn_width=3, activation="relu", is_gated=False)
    with torch.no_grad():
        experts.w1[:] = experts.w2[:] = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
        router.gate.weight[:] = torch.tensor([[0.1, 0.1, 0.0], [0.0, 0.0, 0.0]])
    is_many_T1 = torch.arange(9)[:, None] < 6
    x_TD = torch.where(is_many_T1, torch.tensor([1.0, 1.0, 0.5]), torch.tensor([1.0, 1.0, -0.5]))
    grad_TD = torch.where(is_many_T1, 1.0, -1.0) * torch.tensor([1.0, 0.0, 0.0])
    context = RoutingContext.all_language((1, 9), torch.device("cpu"))
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    conflicts, choices = [], []
    for _ in range(60):
        optimizer.zero_grad()
        decision = router(x_TD, context)
        # detached weights: the router learns from the conflict loss alone
        out_TD = run_layer(LocalDispatcher(), experts, x_TD, decision._replace(weights_RK=decision.weights_RK.detach()))
        torch.autograd.backward([out_TD, decision.penalty], [grad_TD, torch.ones(())])
        optimizer.step()
        conflicts.append(int(decision.conflict_RK.sum()))
        choices.append(decision.expert_ids_RK[:, 0].tolist())
    assert conflicts[0] == 3 and choices[0] == [0] * 9
    assert conflicts[-1] == (3 if coefficient == 0 else 0)
    assert choices[-1] == ([0] * 9 if coefficient == 0 else [0] * 6 + [1] * 3)
