"""The cosine gate against its formula, by hand; Gumbel noise against the distribution that it must have."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from moe_lvlm.config.moe import CosineGateSettings, MoEConfig
from moe_lvlm.routing.gates import CosineGate
from tests.routing.tables import A, hidden_of, identity_router, language_context


def cosine_gate(*, temperature: float = 0.5) -> CosineGate:
    """Projects (x, y) to (2x, y + 1); expert 0 lies at (3, 4), expert 1 at (0, -2)."""
    gate = CosineGate(2, 2, CosineGateSettings(projection=2, temperature=temperature))
    with torch.no_grad():
        gate.projection.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        gate.bias.copy_(torch.tensor([0.0, 1.0]))
        gate.experts.copy_(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    return gate


def test_cosine_by_hand() -> None:
    # (1.5, 3) -> (3, 4): cosines 1 and -.8;  (2, -1) -> (4, 0): cosines .6 and 0; divided by .5
    logits = cosine_gate()(torch.tensor([[1.5, 3.0], [2.0, -1.0]]))
    assert_close(logits, torch.tensor([[2.0, -1.6], [1.2, 0.0]]))


def test_length_of_a_token_does_not_matter_without_bias() -> None:
    gate = cosine_gate()
    with torch.no_grad():
        gate.bias.zero_()
    x = torch.tensor([[0.3, -0.7]])
    assert_close(gate(1000 * x), gate(x))


def test_the_temperature_is_learned_and_bounded() -> None:
    gate = cosine_gate(temperature=0.25)
    assert gate.log_scale.item() == pytest.approx(math.log(4))
    with torch.no_grad():
        gate.log_scale.fill_(20.0)
    assert_close(gate(torch.tensor([[1.5, 3.0]])), torch.tensor([[100.0, -80.0]]))


def test_bf16_weights_are_multiplied_in_float32() -> None:
    gate = cosine_gate().bfloat16()
    x = torch.tensor([[1.5, 3.0], [2.0, -1.0]]).bfloat16()
    logits = gate(x)
    assert logits.dtype == torch.float32
    # log 2 is .6914 in bf16, so the scale is 1.9966; everything else here is exact
    scale = math.exp(float(torch.tensor(math.log(2)).bfloat16()))
    assert_close(logits, torch.tensor([[1.0, -0.8], [0.6, 0.0]]) * scale)


def test_the_second_choice_follows_the_softmax_over_the_others() -> None:
    """Gumbel-max: the second expert of A = (.4, .3, .2, .1) is 1, 2, 3 with .3 / .6, .2 / .6, .1 / .6."""
    torch.manual_seed(0)
    num = 60_000
    router = identity_router(second_choice_noise="gumbel").train()
    decision = router(hidden_of(A).expand(num, 4), language_context(num))
    assert (decision.expert_ids_RK[:, 0] == 0).all()
    share = decision.expert_ids_RK[:, 1].bincount(minlength=4) / num
    # five standard deviations of a share of one half
    assert_close(share, torch.tensor([0, 1 / 2, 1 / 3, 1 / 6]), atol=5 * 0.5 / math.sqrt(num), rtol=0)
    # weights are the plain probabilities of the chosen: .4 / (.4 + .2) where 2 was drawn
    drawn = decision.expert_ids_RK[:, 1] == 2
    assert_close(decision.weights_RK[drawn][0], torch.tensor([2 / 3, 1 / 3]))


def test_outside_training_there_is_no_noise() -> None:
    decision = identity_router(second_choice_noise="gumbel").eval()(hidden_of(A).expand(50, 4), language_context(50))
    assert (decision.expert_ids_RK == torch.tensor([0, 1])).all()


def test_gumbel_is_for_two_choices() -> None:
    with pytest.raises(ValueError, match="gumbel is for top_k 2, which is 1"):
        MoEConfig.model_validate({"top_k": 1, "router": {"kind": "top_k", "second_choice_noise": "gumbel"}})
