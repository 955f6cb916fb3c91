"""The importance loss, by hand and beside a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_lvlm.connectors.importance import importance_loss
from moe_lvlm.routing.types import RoutingDecision


def decision(probs: list[list[float]], keep: list[bool] | None = None) -> RoutingDecision:
    probs_RE = torch.tensor(probs, dtype=torch.float32, requires_grad=True)
    keep_R1 = torch.tensor(keep if keep is not None else [True] * len(probs))[:, None]
    ids_R1 = probs_RE.argmax(dim=-1, keepdim=True)
    return RoutingDecision(probs_RE.log(), probs_RE, ids_R1, probs_RE.gather(1, ids_R1), keep_R1, level="image")


def alone(x: Tensor) -> Tensor:
    return x


def test_by_hand() -> None:
    """Layer 0: importance (1.5, 0.5), mean 1, variance 0.25. Layer 1: (1, 1). The mean over layers is 0.125."""
    layers = [decision([[0.9, 0.1], [0.6, 0.4]]), decision([[0.8, 0.2], [0.2, 0.8]])]
    assert importance_loss(layers[:1], alone).item() == pytest.approx(0.25)
    assert importance_loss(layers, alone).item() == pytest.approx(0.125)


def test_three_experts_beside_python() -> None:
    """Population variance over experts: one expert of E takes all, E - 1."""
    assert importance_loss([decision([[1, 0, 0]] * 4)], alone).item() == pytest.approx(2)
    sums = [0.7 + 0.2, 0.2 + 0.5, 0.1 + 0.3]
    mean = sum(sums) / 3
    expected = sum((value - mean) ** 2 for value in sums) / 3 / mean**2
    found = importance_loss([decision([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]])], alone)
    assert found.item() == pytest.approx(expected)


def test_rows_that_do_not_count_have_no_part() -> None:
    layer = decision([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [True, False, True])
    loss = importance_loss([layer], alone)
    assert loss.item() == pytest.approx(0.25)
    (grad,) = torch.autograd.grad(loss, layer.probs_RE)
    assert not grad[1].any() and grad[0].any()


def test_no_row_that_counts() -> None:
    layer = decision([[0.9, 0.1], [0.2, 0.8]], [False, False])
    loss = importance_loss([layer], alone)
    (grad,) = torch.autograd.grad(loss, layer.probs_RE)
    assert loss.item() == 0 and grad.tolist() == [[0, 0], [0, 0]]


def test_one_expert() -> None:
    layer = decision([[1.0], [1.0]])
    loss = importance_loss([layer], alone)
    (grad,) = torch.autograd.grad(loss, layer.probs_RE)
    assert loss.item() == 0 and not grad.any()


def test_the_gradient() -> None:
    """Of var / mean^2 by I_i for I = (1.5, 0.5), whose mean is 1: 2 (I_i - 1) / E - 2 var / E = (.5 - .25, -.5 - .25)."""
    layer = decision([[0.9, 0.1], [0.6, 0.4]])
    (grad,) = torch.autograd.grad(importance_loss([layer], alone), layer.probs_RE)
    torch.testing.assert_close(grad, torch.tensor([[0.25, -0.75]] * 2))


def test_ranks_are_summed_once_before_the_statistics() -> None:
    """Two ranks, each of which uses one expert, are even together; one stacked tensor goes through."""
    calls: list[Tensor] = []
    other_LE = torch.tensor([[0.0, 1.0], [0.5, 0.5]])

    def sum_over_ranks(x: Tensor) -> Tensor:
        calls.append(x)
        return x + other_LE

    layers = [decision([[1.0, 0.0]]), decision([[0.5, 0.5]])]
    assert importance_loss(layers[:1], alone).item() == pytest.approx(1)
    assert importance_loss(layers, sum_over_ranks).item() == pytest.approx(0)
    assert [call.shape for call in calls] == [(2, 2)]


def test_no_decisions() -> None:
    with pytest.raises(ValueError, match="importance loss: no decisions"):
        importance_loss([], alone)
