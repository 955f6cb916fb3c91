"""Statistics of one trace, against the table worked out by hand in conftest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moe_lvlm.analysis.measures import (
    LoadCounter,
    expert_load,
    routing_entropy,
    site_name,
    site_of,
    tail_by_site,
    tail_flags,
)
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext, RoutingDecision, Site
from tests.analysis.traces import connector_trace

SITE = Site("language_model", 2)
LANGUAGE_LOAD, VISION_LOAD = [3, 2, 0, 1], [5, 5, 2, 2]


def test_tail_is_above_the_mean_of_its_own_image(hand_trace: RoutingTrace) -> None:
    flags = tail_flags(hand_trace[SITE].probs_RE, hand_trace.context)
    assert flags.nonzero().flatten().tolist() == [1, 5]


def test_expert_load_counts_kept_slots_by_modality(hand_trace: RoutingTrace) -> None:
    routing = hand_trace[SITE].by_token(hand_trace.context)
    assert expert_load(routing, hand_trace.context.modality_T).tolist() == [LANGUAGE_LOAD, VISION_LOAD]


def test_entropy_in_nats() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25] * 4])
    torch.testing.assert_close(routing_entropy(probs), torch.tensor([0.0, math.log(2), math.log(4)]))


def summary_of(trace: RoutingTrace) -> dict[str, Any]:
    counter = LoadCounter()
    counter.update(trace)
    return counter.summary()


def test_load_counter_says_what_the_log_wants(hand_trace: RoutingTrace) -> None:
    assert summary_of(hand_trace) == {
        "expert_load": {"2": {"language": LANGUAGE_LOAD, "vision": VISION_LOAD}},
        "tail_share": {"2": 2 / 5},
    }


def test_load_counter_adds_micro_batches_and_leaves_traces_alone(hand_trace: RoutingTrace) -> None:
    counter = LoadCounter()
    counter.update(hand_trace)
    counter.update(hand_trace)
    counter.update(hand_trace)
    assert counter.summary() == {
        "expert_load": {"2": {"language": [9, 6, 0, 3], "vision": [15, 15, 6, 6]}},
        "tail_share": {"2": 2 / 5},
    }
    assert [tensor.tolist() for tensor in counter.tensors()] == [[[9, 6, 0, 3], [15, 15, 6, 6]], [6, 15]]


def test_load_counter_counts_conflicts_where_the_router_looks_for_them(hand_trace: RoutingTrace) -> None:
    conflict_TK = torch.zeros(10, 4, dtype=torch.bool)
    conflict_TK[[1, 1, 7], [0, 3, 0]] = True  # vision at experts 0 and 3, language at expert 3
    trace = RoutingTrace(hand_trace.context)
    trace.record(SITE, hand_trace[SITE]._replace(conflict_RK=conflict_TK))
    counter = LoadCounter()
    counter.update(trace)
    counter.update(trace)
    assert counter.summary()["conflicts"] == {"2": {"language": [0, 0, 0, 2], "vision": [2, 0, 0, 2]}}
    assert [[0, 0, 0, 2], [2, 0, 0, 2]] in [tensor.tolist() for tensor in counter.tensors()]


def test_load_counter_sums_over_ranks_in_place(hand_trace: RoutingTrace) -> None:
    counter = LoadCounter()
    counter.update(hand_trace)
    for tensor in counter.tensors():
        tensor.mul_(2)  # what an all-reduce over two equal ranks does
    assert counter.summary()["expert_load"] == {"2": {"language": [6, 4, 0, 2], "vision": [10, 10, 4, 4]}}


def test_load_counter_of_text_and_of_a_dense_model() -> None:
    context = RoutingContext.all_language((1, 3), torch.device("cpu"))
    trace = RoutingTrace(context)
    assert summary_of(trace) == {"expert_load": None, "tail_share": None}
    probs = torch.tensor([[0.6, 0.4]] * 3)
    decision = RoutingDecision(probs.log(), probs, torch.zeros(3, 1).long(), probs[:, :1], torch.ones(3, 1).bool())
    trace.record(Site("connector", 0), decision)
    assert summary_of(trace) == {
        "expert_load": {"connector.0": {"language": [3, 0], "vision": [0, 0]}},
        "tail_share": None,
    }


def test_sample_level_decision_counts_for_every_token_of_its_sample(hand_trace: RoutingTrace) -> None:
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    decision = RoutingDecision(
        probs.log(), probs, torch.tensor([[0], [1]]), torch.ones(2, 1), torch.ones(2, 1).bool(), "sample"
    )
    routing = decision.by_token(hand_trace.context)
    # Sample 0: one language, three vision tokens; sample 1: two of each; padding counts nowhere.
    assert expert_load(routing, hand_trace.context.modality_T).tolist() == [[1, 2], [3, 2]]
    assert routing.probs_RE[4].tolist() == [0.0, 0.0]


def test_images_of_a_connector_count_as_their_visual_tokens() -> None:
    # three images of four tokens; at layer 2 two take expert 1 and one takes expert 0, at layer 3 all take expert 2
    trace = connector_trace([(1, 2), (0, 2), (1, 2)], layers=(2, 3), tokens=4)
    # probabilities are alike all over an image: rounding of their mean must not make a tail
    assert summary_of(trace) == {
        "expert_load": {
            "connector.3": {"language": [0, 0, 0], "vision": [0, 0, 12]},
            "connector.2": {"language": [0, 0, 0], "vision": [4, 8, 0]},
        },
        "tail_share": None,
    }


def test_an_image_that_stands_for_none_counts_nowhere_in_the_log() -> None:
    context = RoutingContext.all_language((2, 3), torch.device("cpu"))
    trace = RoutingTrace(context)
    blank = connector_trace([(1,)], layers=(2,), keep=[False])
    trace.record(Site("connector", 2), blank[Site("connector", 2)])
    assert summary_of(trace)["expert_load"] == {"connector.2": {"language": [0, 0, 0], "vision": [0, 0, 0]}}


def test_rows_that_are_not_tokens_are_refused(hand_trace: RoutingTrace) -> None:
    with pytest.raises(ValueError, match="10 rows and the context 3 tokens"):
        hand_trace[SITE].by_token(RoutingContext.all_language((1, 3), torch.device("cpu")))


def test_tail_by_site_gives_one_image_in_patch_order(hand_trace: RoutingTrace) -> None:
    assert tail_by_site(hand_trace, 0)[SITE].tolist() == [True, False, False]
    assert tail_by_site(hand_trace, 1)[SITE].tolist() == [True, False]
    with pytest.raises(ValueError, match="image 2: not in this trace's batch; allowed: 0 to 1"):
        tail_by_site(hand_trace, 2)


def test_a_connector_has_no_tail(hand_trace: RoutingTrace) -> None:
    connector = connector_trace([(1,), (0,)], layers=(7,))
    hand_trace.record(Site("connector", 7), connector[Site("connector", 7)])
    assert set(tail_by_site(hand_trace, 0)) == {SITE}
    assert set(summary_of(hand_trace)["tail_share"]) == {"2"}
    assert set(summary_of(hand_trace)["expert_load"]) == {"2", "connector.7"}


def test_sites_are_named_both_ways() -> None:
    names = {Site("language_model", 10): "10", Site("connector", 9): "connector.9"}
    assert [site_name(site) for site in names] == list(names.values())
    assert [site_of(name) for name in names.values()] == list(names)


def test_gradients_are_not_kept(hand_trace: RoutingTrace) -> None:
    probs = hand_trace[SITE].probs_RE.clone().requires_grad_()
    trace = RoutingTrace(hand_trace.context)
    trace.record(SITE, hand_trace[SITE]._replace(probs_RE=probs))
    counter = LoadCounter()
    counter.update(trace)
    assert not any(tensor.requires_grad for tensor in counter.tensors())
