"""Dispatch on one process: nothing is dropped, nothing mixed up."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from moe_lvlm.moe.dispatch import LocalDispatcher
from moe_lvlm.moe.rows import RowPlan, add_rows, plan_rows, take_rows, take_slots
from tests.moe.tables import decision_of, random_experts, run_layer

# the third token is padding; the others use 2, 1, 3 and 2 experts; nobody uses expert 3
CHOICES = ((2, 0), (1,), (), (0, 4, 2), (4, 1))


def test_rows_are_sorted_by_expert_then_token() -> None:
    plan = plan_rows(decision_of(CHOICES, 5))
    # expert 0: token 0 (slot 1), token 3 (slot 0); 1: token 1 (0), token 4 (1); 2: token 0 (0), 3 (2); 4: 3 (1), 4 (0)
    assert plan.source_R.tolist() == [0, 3, 1, 4, 0, 3, 3, 4]
    assert (plan.slot_R % 3).tolist() == [1, 0, 0, 1, 0, 2, 1, 0]
    assert plan.counts == (2, 2, 2, 0, 2)
    assert plan.stop_E.tolist() == [2, 4, 6, 6, 8]
    assert plan.row_NK.tolist() == [[4, 0, -1], [2, -1, -1], [-1, -1, -1], [1, 6, 5], [7, 3, -1]]


def test_rows_and_weights_follow_their_slots() -> None:
    decision = decision_of(CHOICES, 5)
    x_TD = torch.arange(5.0)[:, None].expand(5, 6)
    plan = plan_rows(decision)
    assert take_rows(x_TD, plan)[:, 0].tolist() == [0, 3, 1, 4, 0, 3, 3, 4]
    weights = decision.weights_RK
    expected = [weights[0, 1], weights[3, 0], weights[1, 0], weights[4, 1], weights[0, 0], weights[3, 2], weights[3, 1]]
    assert_close(take_slots(weights, plan), torch.stack([*expected, weights[4, 0]]))


def test_a_plan_that_the_host_has_not_looked_at_can_be_counted() -> None:
    plan = plan_rows(decision_of(CHOICES, 5))
    # as on CUDA: as many places as there are slots, those after the last row undefined
    unknown = torch.full((15 - 8,), 99, dtype=torch.int32)
    uncounted = RowPlan(torch.cat((plan.slot_R, unknown)), plan.row_NK, plan.stop_E, None)
    counted = uncounted.counted()
    assert counted.counts == plan.counts
    assert counted.slot_R.tolist() == plan.slot_R.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_taken_and_added_up_give_the_input_back(dtype: torch.dtype) -> None:
    x_TD = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    decision = decision_of(CHOICES, 5)
    plan = plan_rows(decision)
    weighted_RD = take_rows(x_TD, plan).float() * take_slots(decision.weights_RK, plan)[:, None]
    out_TD = add_rows(weighted_RD, plan, dtype)
    assert out_TD.dtype == dtype
    expected = x_TD.clone()
    expected[2] = 0  # padding
    assert_close(out_TD, expected)


def test_many_tokens_on_one_expert_are_all_kept() -> None:
    rows = LocalDispatcher().dispatch(torch.randn(200, 6), decision_of([(3,)] * 200, 8, num_slots=1)).rows()
    assert rows.plan.counts == (0, 0, 0, 200, 0, 0, 0, 0)
    assert rows.plan.source_R.tolist() == list(range(200))


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
