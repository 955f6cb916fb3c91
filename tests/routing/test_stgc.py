"""STGC's router: the gradient of its loss by hand, and that it is plain top-k otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.types import RoutingContext, RoutingDecision
from tests.routing.tables import A, F, G, H, context_of, hidden_of, identity_router, language_context

# Two language tokens, then padding; the probabilities are .4 .3 .2 .1 and .6 .2 .1 .1, the best two experts 0 and 1.
TOKENS = (A, F, G)
# What the experts would answer: token A agrees with expert 0 and not with 1, F just misses the threshold at both.
COSINES = torch.tensor([[0.9, -0.3], [-0.1, 0.0], [-1.0, -1.0]])


def decided(router: Router) -> tuple[RoutingDecision, Tensor]:
    """The decision, and the scores to take gradients by."""
    x_TD = hidden_of(*TOKENS).requires_grad_()
    decision = router(x_TD, context_of((1, 1, 0), (-1, -1, -1), (0, 0, -1), rows=1))
    return decision, x_TD


def answer(decision: RoutingDecision, *, scale: float = 1.0) -> None:
    """Backward of the penalty, with the experts' answer to the probe."""
    assert decision.probe_RK is not None and decision.penalty is not None
    torch.autograd.backward([decision.probe_RK, scale * decision.penalty], [COSINES, torch.ones(())])


def test_the_gradient_by_hand() -> None:
    decision, x_TD = decided(identity_router(kind="stgc", threshold=-0.2, coefficient=0.5))
    assert decision.penalty is not None and decision.conflict_RK is not None and decision.probe_RK is not None
    assert decision.penalty == 0 and not decision.probe_RK.any()
    answer(decision, scale=4.0)
    assert decision.conflict_RK.tolist() == [[False, True], [False, False], [False, False]]
    # -log softmax(-z)_1 of token A: softmax(-z) is 1/p over its sum, and the gradient 1 at expert 1 minus softmax(-z)
    inverse = torch.tensor([1 / p for p in A])
    expected = torch.tensor([0.0, 1.0, 0.0, 0.0]) - inverse / inverse.sum()
    assert x_TD.grad is not None
    assert_close(x_TD.grad[0], 4.0 * 0.5 / 2 * expected)  # scale x coefficient / tokens without padding
    assert not x_TD.grad[1:].any()
    # descent lowers the score of the expert in conflict against all others
    assert x_TD.grad[0, 1] > 0
    assert (x_TD.grad[0, [0, 2, 3]] < 0).all()


def test_a_cosine_at_the_threshold_is_no_conflict() -> None:
    decision, _ = decided(identity_router(kind="stgc", threshold=0.0))
    answer(decision)
    assert decision.conflict_RK is not None
    assert decision.conflict_RK.tolist() == [[False, True], [True, False], [False, False]]


def test_padding_is_in_no_conflict_at_any_threshold() -> None:
    decision, _ = decided(identity_router(kind="stgc", threshold=1.0))
    answer(decision)
    assert decision.conflict_RK is not None
    assert decision.conflict_RK.tolist() == [[True, True], [True, True], [False, False]]


def test_without_an_answer_there_is_no_conflict_and_no_gradient() -> None:
    decision, x_TD = decided(identity_router(kind="stgc", threshold=1.0))
    assert decision.penalty is not None and decision.conflict_RK is not None
    (decision.penalty + decision.logits_RE.sum()).backward()
    assert not decision.conflict_RK.any()
    assert x_TD.grad is not None
    assert_close(x_TD.grad, torch.ones(3, 4))


@pytest.mark.parametrize("is_training", [True, False])
def test_choices_and_weights_are_top_k(is_training: bool) -> None:
    x_TD, context = hidden_of(A, F, H), language_context(3)
    plain = identity_router()(x_TD, context)
    decision = identity_router(kind="stgc").train(is_training)(x_TD, context)
    assert all(torch.equal(value, expected) for value, expected in zip(decision[:5], plain[:5], strict=True))


def test_outside_training_nothing_is_asked() -> None:
    router = identity_router(kind="stgc")
    x_TD, context = hidden_of(A, F), language_context(2)
    with torch.no_grad():
        asked = [router(x_TD, context)]
    asked.append(router.eval()(x_TD, context))
    for decision in asked:
        assert (decision.penalty, decision.probe_RK, decision.conflict_RK) == (None, None, None)


def test_capacity_and_noise_are_top_ks() -> None:
    """What is dropped for want of capacity is in no conflict."""
    config: dict[str, Any] = {"num_experts": 4, "router": {"kind": "stgc", "threshold": 1.0}}
    router = build_router(model_width=4, config=MoEConfig.model_validate({**config, "capacity_factor": 0.5}))
    decision: RoutingDecision = router(hidden_of(*[F] * 8), RoutingContext.all_language((1, 8), torch.device("cpu")))
    assert decision.probe_RK is not None and decision.conflict_RK is not None
    assert decision.keep_RK.sum() == 4  # 2 rows of each of two experts: ceil(2 x 0.5 x 8 / 4) = 2
    decision.probe_RK.backward(-torch.ones_like(decision.probe_RK))
    assert torch.equal(decision.conflict_RK, decision.keep_RK)


@pytest.mark.parametrize(("key", "value"), [("threshold", 1.5), ("threshold", -2), ("coefficient", -0.1)])
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValidationError, match=key):
        MoEConfig.model_validate({"router": {"kind": "stgc", key: value}})
