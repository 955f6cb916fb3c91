"""Experts in groups by modality (LTDR table 11), by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.losses import auxiliary_loss
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingDecision, Site
from tests.routing.tables import TOKENS, hidden_of, identity_router, table_context


def decide(top_k: int = 1) -> RoutingDecision:
    """Experts 0 and 1 are vision's, 2 and 3 language's."""
    return identity_router(top_k=top_k, kind="modality_groups", vision_experts=2)(hidden_of(*TOKENS), table_context())


def test_the_softmax_is_within_the_group() -> None:
    decision = decide()
    # G and H are language: (.01, .01) -> 1/2, 1/2 and (.3, .4) -> 3/7, 4/7
    assert_close(decision.probs_RE[0], torch.tensor([0, 0, 1 / 2, 1 / 2]))
    assert_close(decision.probs_RE[8], torch.tensor([0, 0, 3 / 7, 4 / 7]))
    # A and D are vision: (.4, .3) and (.05, .55)
    assert_close(decision.probs_RE[1], torch.tensor([4 / 7, 3 / 7, 0, 0]))
    assert_close(decision.probs_RE[6], torch.tensor([1 / 12, 11 / 12, 0, 0]))
    assert decision.expert_ids_RK[:, 0].tolist() == [2, 0, 0, 0, 2, 0, 1, 0, 3, 2]


def test_an_expert_of_the_other_group_is_never_chosen() -> None:
    decision = decide(top_k=2)
    vision, language = [1, 2, 3, 5, 6, 7], [0, 8]
    assert decision.expert_ids_RK[vision].max() == 1
    assert decision.expert_ids_RK[language].min() == 2
    # also where the softmax underflows: P of expert 3 is 0 as P of experts 0 and 1 is
    router = identity_router(top_k=2, kind="modality_groups", vision_experts=2)
    x = torch.tensor([[0.0, 0.0, 300.0, 0.0]])
    context = table_context()
    one = type(context).all_language((1, 1), x.device)
    assert router(x, one).expert_ids_RK.tolist() == [[2, 3]]


# vision A C E B D F over two experts: (4/7, 3/7), (1/2, 1/2), (1/2, 1/2), (1/2, 1/2), (1/12, 11/12), (3/4, 1/4)
#   best 0 but for D: F = (5, 1) / 6; sums of P: 4/7 + 3/2 + 1/12 + 3/4 = 2.904762 and 3.095238
#   loss = 2 (5 x 2.904762 + 3.095238) / 36 = .978836
# language G H: (1/2, 1/2), (3/7, 4/7): best 2 and 3, F = 1/2 each, loss = 2 x 1/2 x (1/2 x .928571 + 1/2 x 1.071429) = 1
@pytest.mark.parametrize(
    ("on", "expected"), [(["vision"], 0.978836), (["language"], 1.0), (["language", "vision"], 1.978836), ([], 0.0)]
)
def test_each_group_is_balanced_by_itself(on: list[str], expected: float) -> None:
    trace = RoutingTrace(table_context())
    trace.record(Site("language_model", 0), decide())
    config = MoEConfig.model_validate(
        {"top_k": 1, "router": {"kind": "modality_groups"}, "balance": {"on": on, "coefficient": 0.1}}
    )
    loss = auxiliary_loss(trace, config)
    assert loss is not None
    assert loss.item() == pytest.approx(0.1 * expected, rel=1e-5)


@pytest.mark.parametrize(("vision_experts", "top_k"), [(4, 1), (1, 2), (3, 2)])
def test_each_group_needs_top_k_experts(vision_experts: int, top_k: int) -> None:
    router = {"kind": "modality_groups", "vision_experts": vision_experts}
    with pytest.raises(ValueError, match=f"{vision_experts} of 4 experts; allowed: at least top_k"):
        MoEConfig.model_validate({"top_k": top_k, "router": router})
