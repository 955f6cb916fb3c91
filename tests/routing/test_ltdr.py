"""LTDR's tail and its experts, against tables worked by hand (`tests/routing/tables.py`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe_lvlm.config.moe import LongTailRouterSettings, MoEConfig
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.ltdr import routing_probability_variance, vision_tail
from tests.routing.tables import (
    NAMES,
    RPV,
    TOKENS,
    VIS,
    A,
    B,
    D,
    E,
    context_of,
    hidden_of,
    identity_router,
    language_context,
    names_where,
    table_context,
)


def another_rank(totals_2: Tensor) -> Tensor:
    """A second rank that holds 4 vision tokens with a summed RPV of .30."""
    return totals_2 + torch.tensor([0.30, 4.0])


def test_rpv_by_hand() -> None:
    probs = torch.tensor([token for token, name in zip(TOKENS, NAMES, strict=True) if name != "_"])
    expected = torch.tensor([RPV[name] for name in NAMES if name != "_"])
    assert_close(routing_probability_variance(probs), expected, atol=1e-7, rtol=1e-5)


def test_rpv_is_float32_and_has_no_gradient() -> None:
    probs = torch.tensor([A, B], dtype=torch.bfloat16).requires_grad_()
    rpv = routing_probability_variance(probs)
    assert rpv.dtype == torch.float32
    assert not rpv.requires_grad


# Image 0 (A .0125, C 0, E .0025): mean .015 / 3 = .005     -> A
# Image 1 (B .0675, D .045, F .0425): mean .155 / 3 = .0517 -> B
# Batch: mean .17 / 6 = .0283                               -> B, D, F
# Global, with 4 tokens of .30 elsewhere: .47 / 10 = .047   -> B
@pytest.mark.parametrize(("scope", "tail"), [("image", "AB"), ("batch", "BDF"), ("global", "B")])
def test_tail_by_scope(scope: str, tail: str) -> None:
    is_tail_T = vision_tail(torch.tensor(TOKENS), table_context(), scope=scope, sum_over_ranks=another_rank)
    assert names_where(is_tail_T) == tail


def test_global_scope_on_one_process_is_the_batch() -> None:
    assert names_where(vision_tail(torch.tensor(TOKENS), table_context(), scope="global")) == "BDF"


def test_a_batch_without_vision_has_no_tail() -> None:
    for scope in ("batch", "image", "global"):
        assert not vision_tail(torch.tensor([A, B, D]), language_context(3), scope=scope).any()


def test_unknown_scope_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="'row'; allowed: batch, image, global"):
        vision_tail(torch.tensor(TOKENS), table_context(), scope="row")


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8])
def test_a_token_at_the_mean_is_not_tail(num_tokens: int) -> None:
    # powers of two: the mean is exact
    context = context_of((VIS,) * num_tokens, (0,) * num_tokens, (0,) * num_tokens, rows=1)
    for scope in ("batch", "image", "global"):
        assert not vision_tail(torch.tensor([B] * num_tokens), context, scope=scope).any()


def test_tokens_that_are_all_alike_have_no_tail() -> None:
    # No token can be above a mean of equal numbers: a sum that rounds down must not make all of them tail.
    for num_tokens in (7, 49, 576):
        context = context_of((VIS,) * num_tokens, (0,) * num_tokens, (0,) * num_tokens, rows=1)
        for scope in ("batch", "image"):
            for token in (A, B, D, E):
                assert not vision_tail(torch.tensor([token] * num_tokens), context, scope=scope).any()


def test_tail_tokens_use_all_experts_with_their_probabilities() -> None:
    router = identity_router(kind="ltdr", tail_scope="batch").train()
    decision = router(hidden_of(*TOKENS), table_context())
    assert decision.keep_RK.sum(dim=-1).tolist() == [2, 2, 2, 2, 0, 4, 4, 4, 2, 0]
    # D is tail: 1, 3, then 0 before 2; all four probabilities sum to 1 already
    assert decision.expert_ids_RK[6].tolist() == [1, 3, 0, 2]
    assert_close(decision.weights_RK[6], torch.tensor([0.55, 0.35, 0.05, 0.05]))
    # A is head: .4 / .7, .3 / .7, and no weight on the slots that it does not use
    assert_close(decision.weights_RK[1], torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]))


def test_tail_k_of_three() -> None:
    router = identity_router(kind="ltdr", tail_scope="batch", tail_k=3).train()
    decision = router(hidden_of(*TOKENS), table_context())
    assert decision.expert_ids_RK.shape == (10, 3)
    assert decision.keep_RK.sum(dim=-1).tolist() == [2, 2, 2, 2, 0, 3, 3, 3, 2, 0]
    # D: .55, .35, .05 over .95    B: .7, .1, .1 over .9
    assert_close(decision.weights_RK[6], torch.tensor([11 / 19, 7 / 19, 1 / 19]))
    assert_close(decision.weights_RK[5], torch.tensor([7 / 9, 1 / 9, 1 / 9]))


def test_literal_equation_weights_of_tail_and_head() -> None:
    router = identity_router(kind="ltdr", tail_scope="batch", tail_k=3, renormalize=False).train()
    decision = router(hidden_of(*TOKENS), table_context())
    assert_close(decision.weights_RK[6], torch.tensor([0.55, 0.35, 0.05]))
    assert_close(decision.weights_RK[1], torch.tensor([0.4, 0.3, 0.0]))


def test_top_1_head_beside_a_tail() -> None:
    decision = identity_router(top_k=1, kind="ltdr", tail_scope="batch").train()(hidden_of(*TOKENS), table_context())
    assert decision.keep_RK.sum(dim=-1).tolist() == [1, 1, 1, 1, 0, 4, 4, 4, 1, 0]
    assert_close(decision.weights_RK[1], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert_close(decision.weights_RK[6], torch.tensor([0.55, 0.35, 0.05, 0.05]))


@pytest.mark.parametrize(
    ("tail_scope", "is_training", "tail"),
    [
        ("batch", True, "BDF"),
        ("image", True, "AB"),
        ("global", True, "B"),
        ("batch", False, "AB"),
        ("global", False, "AB"),
    ],
)
def test_scope_follows_the_mode(tail_scope: str, is_training: bool, tail: str) -> None:
    router = identity_router(kind="ltdr", tail_scope=tail_scope).train(is_training)
    router.sum_over_ranks = another_rank
    decision = router(hidden_of(*TOKENS), table_context())
    assert names_where(decision.keep_RK.sum(dim=-1) == 4) == tail


def test_batch_scope_in_evaluation_when_asked_for() -> None:
    router = identity_router(kind="ltdr", eval_tail_scope="batch").eval()
    decision = router(hidden_of(*TOKENS), table_context())
    assert names_where(decision.keep_RK.sum(dim=-1) == 4) == "BDF"


def test_without_eea_it_is_top_k() -> None:
    plain = identity_router(kind="top_k").train()(hidden_of(*TOKENS), table_context())
    without = identity_router(kind="ltdr", eea_select="none").train()(hidden_of(*TOKENS), table_context())
    for expected, value in zip(plain[:5], without[:5], strict=True):
        assert torch.equal(expected, value)


def test_two_images_of_one_sample_have_a_mean_each() -> None:
    # the table again, in one row: images, not samples, are compared
    context = context_of((VIS,) * 6, (0, 1, 0, 1, 0, 1), (0,) * 6, rows=1)
    names = "ABCDEF"
    probs = torch.tensor([dict(zip(NAMES, TOKENS, strict=True))[name] for name in names])
    is_tail_T = vision_tail(probs, context, scope="image")
    assert [name for name, tail in zip(names, is_tail_T.tolist(), strict=True) if tail] == ["A", "B"]


def test_tail_equals_a_loop_over_images() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(40, 4, generator=generator).softmax(dim=-1)
    image_T = torch.randint(0, 5, (40,), generator=generator)
    modality_T = torch.randint(0, 3, (40,), generator=generator)
    images = tuple(torch.where(modality_T == VIS, image_T, -1).tolist())
    context = context_of(tuple(modality_T.tolist()), images, (0,) * 40, rows=4)
    is_tail_T = vision_tail(probs, context, scope="image")
    for image in range(5):
        members = [index for index in range(40) if images[index] == image]
        rpv = {index: sum((p - 0.25) ** 2 for p in probs[index].tolist()) / 4 for index in members}
        mean = sum(rpv.values()) / len(members)
        assert [index for index in members if is_tail_T[index]] == [i for i in members if rpv[i] > mean]
    assert not is_tail_T[modality_T != VIS].any()


def test_tail_k_beyond_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router.tail_k: 5; allowed: top_k \(2\) to num_experts \(4\)"):
        MoEConfig(num_experts=4, top_k=2, router=LongTailRouterSettings(tail_k=5))


def test_default_tail_k_is_all_experts() -> None:
    router = build_router(model_width=4, config=MoEConfig(num_experts=6, top_k=2, router=LongTailRouterSettings()))
    assert router.num_slots == 6
