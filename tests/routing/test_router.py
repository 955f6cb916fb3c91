"""The choice of experts and their weights, against tables worked by hand (`tests/routing/tables.py`)."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.gates import LinearGate
from tests.routing.tables import A, B, C, D, E, F, H, hidden_of, identity_router, language_context, table_context


def test_top_k_takes_the_best_experts_and_renormalises() -> None:
    decision = identity_router(top_k=2)(hidden_of(A, D, H), language_context(3))
    assert decision.expert_ids_RK.tolist() == [[0, 1], [1, 3], [3, 2]]
    # A: .4 / .7, .3 / .7    D: .55 / .90, .35 / .90    H: .4 / .7, .3 / .7
    expected = torch.tensor([[4 / 7, 3 / 7], [11 / 18, 7 / 18], [4 / 7, 3 / 7]])
    assert_close(decision.weights_RK, expected)
    assert_close(decision.probs_RE, torch.tensor([A, D, H]))
    assert_close(decision.logits_RE, hidden_of(A, D, H))
    assert decision.keep_RK.all()
    assert decision.level == "token"


def test_without_renormalising_the_weights_are_the_probabilities() -> None:
    decision = identity_router(top_k=2, renormalize=False)(hidden_of(A, D), language_context(2))
    assert_close(decision.weights_RK, torch.tensor([[0.4, 0.3], [0.55, 0.35]]))


def test_ties_go_to_the_lowest_index() -> None:
    decision = identity_router(top_k=3)(hidden_of(C, B, E), language_context(3))
    # C: all alike -> 0, 1, 2    B: 2, then 0 and 1 of three alike    E: 2 = 3, then 0 of 0 = 1
    assert decision.expert_ids_RK.tolist() == [[0, 1, 2], [2, 0, 1], [2, 3, 0]]


def test_one_expert_has_weight_one_and_the_gradient_of_its_probability() -> None:
    x_TD = hidden_of(A).requires_grad_()
    decision = identity_router(top_k=1)(x_TD, language_context(1))
    assert decision.weights_RK.tolist() == [[1.0]]
    decision.weights_RK.sum().backward()
    assert x_TD.grad is not None
    # d(P0 / .4) / d logits = P0 (onehot - P) / .4 = (1 - .4, -.3, -.2, -.1)
    assert_close(x_TD.grad, torch.tensor([[0.6, -0.3, -0.2, -0.1]]))


def test_one_expert_with_its_raw_probability() -> None:
    x_TD = hidden_of(A, D).requires_grad_()
    decision = identity_router(top_k=1, top1_weight="probability")(x_TD, language_context(2))
    assert_close(decision.weights_RK, torch.tensor([[0.4], [0.55]]))
    decision.weights_RK[0].sum().backward()
    assert x_TD.grad is not None
    # .4 x (.6, -.3, -.2, -.1)
    assert_close(x_TD.grad[0], torch.tensor([0.24, -0.12, -0.08, -0.04]))


def test_raw_probability_and_the_literal_equation_agree_for_one_expert() -> None:
    literal = identity_router(top_k=1, renormalize=False)(hidden_of(A, D), language_context(2))
    assert_close(literal.weights_RK, torch.tensor([[0.4], [0.55]]))


def test_renormalised_weights_have_the_gradient_of_a_softmax_over_the_chosen() -> None:
    x_TD = hidden_of(A).requires_grad_()
    decision = identity_router(top_k=2)(x_TD, language_context(1))
    decision.weights_RK[0, 0].backward()
    # a softmax over two logits: w0 w1 (1, -1) = 12/49, and none for the experts not chosen
    assert_close(x_TD.grad, torch.tensor([[12 / 49, -12 / 49, 0.0, 0.0]]))


@pytest.mark.parametrize("kind", ["top_k", "ltdr"])
def test_padding_keeps_nothing(kind: str) -> None:
    x_TD = hidden_of(*([F] * 10)).requires_grad_()
    decision = identity_router(kind=kind)(x_TD, table_context())
    padding = [4, 9]
    assert not decision.keep_RK[padding].any()
    assert decision.weights_RK[padding].abs().sum() == 0
    others = [index for index in range(10) if index not in padding]
    assert_close(decision.weights_RK[others].sum(dim=-1), torch.ones(8))


def test_gradients_stay_finite_at_padding() -> None:
    x_TD = hidden_of(*([F] * 10)).requires_grad_()
    decision = identity_router(kind="ltdr", tail_scope="batch")(x_TD, table_context())
    decision.weights_RK.square().sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()
    assert x_TD.grad[[4, 9]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_is_a_float32_linear_with_its_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate = LinearGate(8, 4).to(dtype)
    x_TD = torch.randn(6, 8, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(6, 4, generator=generator)
    plain_x, plain_weight = (tensor.detach().float().requires_grad_() for tensor in (x_TD, gate.weight))
    expected = plain_x @ plain_weight.t()
    logits = gate(x_TD)
    assert logits.dtype == torch.float32
    assert_close(logits, expected)
    grads = torch.autograd.grad(logits, (x_TD, gate.weight), upstream)
    for grad, plain in zip(grads, torch.autograd.grad(expected, (plain_x, plain_weight), upstream), strict=True):
        assert grad.dtype == dtype
        assert_close(grad, plain.to(dtype))


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_gate_with_a_frozen_side(frozen: str) -> None:
    gate = LinearGate(8, 4)
    x_TD = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(frozen != "input")
    gate.weight.requires_grad_(frozen != "weight")
    gate(x_TD).sum().backward()
    assert (x_TD.grad is None) == (frozen == "input")
    assert (gate.weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize(("init", "low", "high"), [("normal", 0.018, 0.022), ("linear", 0.024, 0.028)])
def test_gate_starts_from_the_distribution_named(init: str, low: float, high: float) -> None:
    # linear: uniform in +-1/sqrt(D) = +-1/22.6, so its deviation is 1/sqrt(3 x 512) = .0255
    torch.manual_seed(0)
    config = MoEConfig.model_validate({"num_experts": 8, "router": {"kind": "top_k", "init": init}})
    router = build_router(model_width=512, config=config)
    assert low < router.gate.weight.std().item() < high
    assert dict(router.gate.named_parameters()).keys() == {"weight"}
