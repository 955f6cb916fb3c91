"""Dispatch on one process: nothing is dropped, nothing mixed up."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from moe_lvlm.moe.dispatch import LocalDispatcher, sort_assignments
from tests.moe.tables import decision_of, random_experts, run_layer

# the third token is padding; the others use 2, 1, 3 and 2 experts; nobody uses expert 3
CHOICES = ((2, 0), (1,), (), (0, 4, 2), (4, 1))


def test_assignments_are_sorted_by_expert_then_token() -> None:
    assignments = sort_assignments(decision_of(CHOICES, 5))
    # expert 0: token 0 (slot 1), token 3 (slot 0); 1: token 1 (0), token 4 (1); 2: token 0 (0), 3 (2); 4: 3 (1), 4 (0)
    assert assignments.token_A.tolist() == [0, 3, 1, 4, 0, 3, 3, 4]
    assert assignments.slot_A.tolist() == [1, 0, 0, 1, 0, 2, 1, 0]
    assert assignments.counts_E.tolist() == [2, 2, 2, 0, 2]


def test_rows_and_weights_follow_their_assignments() -> None:
    decision = decision_of(CHOICES, 5)
    x_TD = torch.arange(5.0)[:, None].expand(5, 6)
    rows, _ = LocalDispatcher().dispatch(x_TD, decision)
    assert rows.counts == (2, 2, 2, 0, 2)
    assert rows.x_RD[:, 0].tolist() == [0, 3, 1, 4, 0, 3, 3, 4]
    weights = decision.weights_RK
    expected = [weights[0, 1], weights[3, 0], weights[1, 0], weights[4, 1], weights[0, 0], weights[3, 2], weights[3, 1]]
    assert_close(rows.weights_R, torch.stack([*expected, weights[4, 0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_experts_give_the_input_back(dtype: torch.dtype) -> None:
    dispatcher = LocalDispatcher()
    x_TD = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, route = dispatcher.dispatch(x_TD, decision_of(CHOICES, 5))
    out_TD = dispatcher.combine(rows.x_RD.float() * rows.weights_R[:, None], route)
    assert out_TD.dtype == dtype
    expected = x_TD.clone()
    expected[2] = 0  # padding
    assert_close(out_TD, expected)


def test_many_tokens_on_one_expert_are_all_kept() -> None:
    dispatcher = LocalDispatcher()
    x_TD = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    rows, route = dispatcher.dispatch(x_TD, decision_of([(3,)] * 200, 8, num_slots=1))
    assert rows.counts == (0, 0, 0, 200, 0, 0, 0, 0)
    assert_close(dispatcher.combine(rows.x_RD * rows.weights_R[:, None], route), x_TD)


def test_outputs_and_gradients_equal_a_loop_over_tokens() -> None:
    experts = random_experts(5).double()
    decision = decision_of(CHOICES, 5)
    weights_RK = decision.weights_RK.double().requires_grad_()
    decision = decision._replace(weights_RK=weights_RK)
    x_TD = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    stacks = dict(experts.named_parameters())
    outputs = []
    for token, chosen in enumerate(CHOICES):
        out = torch.zeros(6, dtype=torch.float64)
        for slot, expert in enumerate(chosen):
            gate = stacks["w1"][expert] @ x_TD[token] + stacks["b1"][expert]
            up = stacks["w3"][expert] @ x_TD[token] + stacks["b3"][expert]
            hidden = torch.nn.functional.silu(gate) * up
            out = out + weights_RK[token, slot] * (stacks["w2"][expert] @ hidden + stacks["b2"][expert])
        outputs.append(out)
    expected_TD = torch.stack(outputs)
    out_TD = run_layer(LocalDispatcher(), experts, x_TD, decision)
    # the sum over a token's experts is made in float32
    assert_close(out_TD, expected_TD, atol=1e-5, rtol=1e-5)
    inputs = (x_TD, weights_RK, *experts.parameters())
    grads = torch.autograd.grad(out_TD.square().sum(), inputs)
    expected_grads = torch.autograd.grad(expected_TD.square().sum(), inputs)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, atol=1e-3, rtol=1e-5)


def test_no_kept_token_gives_zeros_with_a_gradient() -> None:
    x_TD = torch.randn(4, 6).requires_grad_()
    experts = random_experts(5)
    out_TD = run_layer(LocalDispatcher(), experts, x_TD, decision_of([()] * 4, 5))
    assert_close(out_TD, torch.zeros(4, 6))
    out_TD.sum().backward()
    assert_close(x_TD.grad, torch.zeros(4, 6))
    assert all(parameter.grad is not None for parameter in experts.parameters())
