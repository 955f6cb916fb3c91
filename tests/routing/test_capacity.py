"""Capacity with position-based dropping, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moe_lvlm.analysis.measures import LoadCounter
from moe_lvlm.config.moe import BalanceSettings, MoEConfig
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.capacity import drop_over_capacity, expert_capacity
from moe_lvlm.routing.losses import balance_loss, balanced_tokens
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Site
from tests.routing.tables import TOKENS, hidden_of, language_context, table_context


def make_router(**fields: Any) -> Router:
    config = MoEConfig.model_validate({"num_experts": 4, "top_k": 2, "capacity_factor": 0.5} | fields)
    router = build_router(model_width=4, config=config)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(4))
    return router


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "expected"),
    [
        (10, 4, 2, 1.5, 8),  # 7.5
        (10, 4, 2, 0.5, 3),  # 2.5
        (2048, 4, 2, 1.5, 1536),  # exact
        (2048, 4, 2, 2.0, 2048),
        (3, 4, 1, 1.0, 1),
    ],
)
def test_capacity_is_rounded_up(tokens: int, experts: int, top_k: int, factor: float, expected: int) -> None:
    assert expert_capacity(tokens, experts, top_k=top_k, factor=factor) == expected


def test_first_choices_queue_before_second_ones() -> None:
    # expert 0: first choice of tokens 1 and 2, second choice of token 0; room for two
    ids = torch.tensor([[1, 0], [0, 2], [0, 1]])
    kept = drop_over_capacity(ids, torch.ones(3, 2, dtype=torch.bool), num_experts=3, capacity=2)
    assert kept.tolist() == [[True, False], [True, True], [True, True]]


def test_a_slot_that_was_not_chosen_takes_no_room() -> None:
    ids = torch.tensor([[0, 1], [0, 1], [0, 1]])
    chosen = torch.tensor([[False, True], [True, False], [True, True]])
    kept = drop_over_capacity(ids, chosen, num_experts=2, capacity=1)
    assert kept.tolist() == [[False, True], [True, False], [False, False]]


# Table: G A C E . B D F H .   T = 10 with padding, so C = ceil(2 x .5 x 10 / 4) = 3
# first choices   G 0  A 0  C 0  E 2  B 2  D 1  F 0  H 3      expert 0: G A C, then F is dropped
# second choices  G 1  A 1  C 1  E 3  B 0  D 3  F 1  H 2      expert 1: D G A, then C and F; expert 0 is full: B
#                                                             expert 3: H E D; expert 2: E B H
# so dropped are: F's first, C's, B's and F's second
def test_dropping_by_hand() -> None:
    decision = make_router().train()(hidden_of(*TOKENS), table_context())
    assert decision.dropped_RK is not None
    dropped = {(row, slot) for row, slot in decision.dropped_RK.nonzero().tolist()}
    assert dropped == {(7, 0), (2, 1), (5, 1), (7, 1)}
    assert not (decision.keep_RK & decision.dropped_RK).any()
    # renormalised over what is kept: C and B keep their first with weight 1, F keeps nothing, A is as without capacity
    assert_close(decision.weights_RK[[1, 2, 5, 7]], torch.tensor([[4 / 7, 3 / 7], [1, 0], [1, 0], [0, 0]]))


def test_the_literal_weights_are_the_kept_probabilities() -> None:
    decision = make_router(router={"kind": "top_k", "renormalize": False}).train()(hidden_of(*TOKENS), table_context())
    assert_close(decision.weights_RK[[2, 5]], torch.tensor([[0.25, 0], [0.7, 0]]))


def test_one_left_of_two_is_not_a_single_expert() -> None:
    """`top1_weight: probability` is for tokens that choose one expert, not for those that lost the other."""
    router = {"kind": "top_k", "top1_weight": "probability"}
    decision = make_router(router=router).train()(hidden_of(*TOKENS), table_context())
    assert_close(decision.weights_RK[5], torch.tensor([1.0, 0.0]))


def test_outside_training_there_is_more_room() -> None:
    # ceil(2 x 2 x 10 / 4) = 10: nothing is dropped
    decision = make_router().eval()(hidden_of(*TOKENS), table_context())
    assert decision.dropped_RK is not None
    assert not decision.dropped_RK.any()
    # ceil(2 x .5 x 10 / 4) = 3
    decision = make_router(eval_capacity_factor=0.5).eval()(hidden_of(*TOKENS), table_context())
    assert int(decision.dropped_RK.sum()) == 4


def test_tail_tokens_queue_with_all_their_choices() -> None:
    decision = make_router(router={"kind": "ltdr"}).train()(hidden_of(*TOKENS), table_context())
    assert decision.dropped_RK is not None
    # B, D and F are tail and choose four experts each: 2 x 5 + 4 x 3 = 22 assignments for 4 x 3 places
    assert int((decision.keep_RK | decision.dropped_RK).sum()) == 22
    kept = decision.expert_ids_RK[decision.keep_RK].bincount(minlength=4)
    assert kept.tolist() == [3, 3, 3, 3]


def test_dropped_assignments_are_counted_by_modality() -> None:
    decision = make_router().train()(hidden_of(*TOKENS), table_context())
    trace = RoutingTrace(table_context())
    trace.record(Site("language_model", 0), decision)
    counter = LoadCounter()
    counter.update(trace)
    summary = counter.summary()
    # F and B at expert 0, C and F at expert 1; all are vision tokens
    assert summary["dropped"] == {"0": {"language": [0, 0, 0, 0], "vision": [2, 2, 0, 0]}}
    # G A C (0) D G A (1) E B H (2) H E D (3), of which G and H are language
    assert summary["expert_load"] == {"0": {"language": [1, 1, 1, 1], "vision": [2, 2, 2, 2]}}


@pytest.mark.parametrize("fraction", ["top1", "all_choices"])
def test_dropping_does_not_hide_an_imbalance(fraction: str) -> None:
    is_balanced_T = balanced_tokens(table_context(), BalanceSettings().on)
    losses = [
        balance_loss(
            make_router(capacity_factor=c).train()(hidden_of(*TOKENS), table_context()),
            is_balanced_T,
            fraction=fraction,
        )
        for c in (0.5, None)
    ]
    assert_close(losses[0], losses[1])


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_equals_deepspeeds_top_2_gate(factor: float) -> None:
    """MoE-LLaVA's gate without its noise: weights, what is dropped, and the auxiliary loss."""
    from deepspeed.moe.sharded_moe import top2gating

    x = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))
    decision = make_router(capacity_factor=factor).train()(x, language_context(37))
    loss, weights_TEC, mask_TEC, _ = top2gating(x, factor, 0, top2_2nd_expert_sampling=False)
    ours_TE = torch.zeros(37, 4).scatter(1, decision.expert_ids_RK, decision.weights_RK)
    assert_close(ours_TE, weights_TEC.sum(dim=-1))
    kept_TE = torch.zeros(37, 4, dtype=torch.bool).scatter(1, decision.expert_ids_RK, decision.keep_RK)
    assert torch.equal(kept_TE, mask_TEC.any(dim=-1))
    # theirs is the mean over experts of F G E^2, which is ours
    assert_close(balance_loss(decision, torch.ones(37, dtype=torch.bool)), loss)
