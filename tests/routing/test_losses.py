"""The balance loss, by hand on the table of `tests/routing/tables.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moe_lvlm.config.moe import BalanceSettings, MoEConfig
from moe_lvlm.routing.losses import auxiliary_loss, balance_loss, balanced_tokens
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingDecision, Site
from tests.routing.tables import TOKENS, hidden_of, identity_router, language_context, names_where, table_context


def decide(**router: Any) -> RoutingDecision:
    return identity_router(**router).train()(hidden_of(*TOKENS), table_context())


# language G, H: best experts 0, 3           -> F = (1, 0, 0, 1) / 2
#   G_i = (.97+.10, .01+.20, .01+.30, .01+.40) / 2 = (.535, .105, .155, .205)
#   loss = 4 (.5 x .535 + .5 x .205) = 1.48
# vision A, C, E, B, D, F: best 0, 0, 2, 2, 1, 0 (ties: lowest) -> F = (3, 1, 2, 0) / 6
#   sums of P = (1.6, 1.6, 1.6, 1.2), so loss = 4 (3 x 1.6 + 1.6 + 2 x 1.6) / 36 = 38.4 / 36
# both: F = (4, 1, 2, 1) / 8, sums of P = (2.67, 1.81, 1.91, 1.61)
#   loss = 4 (4 x 2.67 + 1.81 + 2 x 1.91 + 1.61) / 64 = 4 x 17.92 / 64 = 1.12
BY_HAND = [(("language",), "GH", 1.48), (("vision",), "ACEBDF", 38.4 / 36), (("language", "vision"), "GACEBDFH", 1.12)]


@pytest.mark.parametrize(("on", "names", "expected"), BY_HAND)
def test_balance_loss_by_modality(on: tuple[Any, ...], names: str, expected: float) -> None:
    is_balanced_T = balanced_tokens(table_context(), on)
    assert names_where(is_balanced_T) == names
    assert balance_loss(decide(), is_balanced_T).item() == pytest.approx(expected, rel=1e-5)


def test_best_expert_alone_counts_for_tail_tokens_too() -> None:
    is_balanced_T = balanced_tokens(table_context(), ("vision",))
    loss = balance_loss(decide(kind="ltdr", tail_scope="batch"), is_balanced_T)
    assert loss.item() == pytest.approx(38.4 / 36, rel=1e-5)


# top-2 on vision: A 01, C 01, E 23, B 20, D 13, F 01 -> F = (4, 4, 2, 2) / 12
#   loss = 4 (4 x 1.6 + 4 x 1.6 + 2 x 1.6 + 2 x 1.2) / (12 x 6) = 73.6 / 72
# with the tail B, D, F on all four: A 01, C 01, E 23 -> F = (5, 5, 4, 4) / 18
#   loss = 4 (8 + 8 + 6.4 + 4.8) / (18 x 6) = 108.8 / 108
@pytest.mark.parametrize(
    ("router", "expected"), [({"kind": "top_k"}, 73.6 / 72), ({"kind": "ltdr", "tail_scope": "batch"}, 108.8 / 108)]
)
def test_all_choices(router: dict[str, Any], expected: float) -> None:
    is_balanced_T = balanced_tokens(table_context(), ("vision",))
    loss = balance_loss(decide(**router), is_balanced_T, fraction="all_choices")
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_even_load_gives_one() -> None:
    # each expert is the best of one token, and all probabilities are even: 4 x 4 x (1/4 x 1/4) = 1
    probs = torch.full((4, 4), 0.25)
    decision = RoutingDecision(probs.log(), probs, torch.arange(4)[:, None], torch.ones(4, 1), torch.ones(4, 1).bool())
    assert balance_loss(decision, torch.ones(4).bool()).item() == pytest.approx(1.0)


def test_gradient_goes_through_the_mean_probability_only() -> None:
    probs = torch.tensor([TOKENS[1], TOKENS[6]]).requires_grad_()  # A: best 0, D: best 1
    decision = RoutingDecision(
        probs.log(), probs, torch.tensor([[0], [1]]), torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool)
    )
    balance_loss(decision, torch.tensor([True, True])).backward()
    # K F_i / n = 4 x 1/2 / 2 = 1 for experts 0 and 1
    assert_close(probs.grad, torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("fraction", ["top1", "all_choices"])
def test_no_token_gives_zero_and_a_gradient_of_zero(fraction: str) -> None:
    router = identity_router()
    decision = router(hidden_of(*TOKENS), table_context())
    is_balanced_T = balanced_tokens(table_context(), ())
    loss = balance_loss(decision, is_balanced_T, fraction=fraction)
    assert loss.item() == 0.0
    loss.backward()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.abs().sum() == 0


def test_text_only_batch_under_a_vision_loss() -> None:
    decision = identity_router()(hidden_of(*TOKENS[:3]), language_context(3))
    is_balanced_T = balanced_tokens(language_context(3), ("vision",))
    loss = balance_loss(decision, is_balanced_T)
    assert loss.item() == 0.0
    assert not math.isnan(loss.item())


def test_auxiliary_loss_sums_over_layers_times_the_coefficient() -> None:
    trace = RoutingTrace(table_context())
    for layer in (0, 2, 4):
        trace.record(Site("language_model", layer), decide())
    loss = auxiliary_loss(trace, MoEConfig(balance=BalanceSettings(coefficient=0.1, on=("language",))))
    assert loss is not None
    # three layers of 1.48 x 0.1; the mean over layers would be .148
    assert loss.item() == pytest.approx(0.444, rel=1e-5)


def test_auxiliary_loss_of_an_empty_trace_is_none() -> None:
    assert auxiliary_loss(RoutingTrace(table_context()), MoEConfig()) is None


def test_a_modality_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="each modality at most once"):
        BalanceSettings(on=("vision", "vision"))
