"""Sums over batches, against the hand-worked trace and against all tokens at once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_lvlm.analysis.statistics import NUM_BINS, RoutingStatistics, highest_variance
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision, Site
from tests.analysis.traces import connector_trace

SITE = Site("language_model", 2)
FOREGROUND = [np.array([1.0, 0.0, 0.4]), np.array([0.2, 0.9])]


def test_values_worked_by_hand(hand_trace: RoutingTrace) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace, FOREGROUND)
    site = statistics[SITE]
    assert site.load.tolist() == [[3, 2, 0, 1], [5, 5, 2, 2]]
    assert site.tokens.tolist() == [3, 5, 2]
    assert site.tail_share == 0.4
    assert site.mean_rpv(Modality.LANGUAGE) == pytest.approx((0.0625 + 0.1875 + 0) / 3)
    assert site.mean_rpv(Modality.VISION) == pytest.approx((0.1875 + 0 + 0.0625 + 0.0625 + 0) / 5)
    # the tail: SURE of image 0, HALF of image 1; the head: EVEN, HALF, EVEN
    assert site.mean_tail_rpv == pytest.approx((0.1875 + 0.0625) / 2)
    assert site.mean_head_rpv == pytest.approx(0.0625 / 3)
    assert site.mean_entropy(Modality.VISION) == pytest.approx((2 * math.log(4) + 2 * math.log(2)) / 5)
    found = site.foreground_agreement()
    assert found is not None
    # Foreground: the first token of image 0, the second of image 1; tail: the first of both.
    assert (found.precision, found.recall) == (0.5, 0.5)
    assert (found.foreground_share, found.tail_share) == (0.4, 0.4)
    assert found.auc == pytest.approx((1.0 + 0.0) / 2)
    assert (found.num_tokens, found.num_images) == (5, 2)


def test_histogram_holds_every_token_in_its_bin(hand_trace: RoutingTrace) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace)
    site = statistics[SITE]
    assert site.edges[0] == 0
    assert site.edges[-1] == highest_variance(4) == 0.1875
    vision = {int(index): int(count) for index, count in enumerate(site.histogram[1]) if count}
    middle = next(index for index in vision if 0 < index < NUM_BINS - 1)
    assert vision == {0: 2, middle: 2, NUM_BINS - 1: 1}
    assert site.edges[middle] <= 0.0625 + 1e-9 <= site.edges[middle + 1] + 1e-9


def test_image_without_a_mask_is_left_out(hand_trace: RoutingTrace) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace, [None, FOREGROUND[1]])
    found = statistics[SITE].foreground_agreement()
    assert found is not None
    assert (found.num_tokens, found.num_images, found.precision, found.auc) == (2, 1, 0.0, 0.0)


def test_image_that_is_all_background_counts_but_has_no_auc(hand_trace: RoutingTrace) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace, [np.zeros(3), np.zeros(2)])
    found = statistics[SITE].foreground_agreement()
    assert found is not None
    assert (found.precision, found.recall, found.auc, found.num_images) == (0.0, None, None, 2)


def test_without_foreground_there_is_no_agreement(hand_trace: RoutingTrace) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace)
    assert statistics[SITE].foreground_agreement() is None


@pytest.mark.parametrize(
    ("foreground", "message"),
    [
        ([FOREGROUND[0]], "1 images; allowed: 2"),
        ([FOREGROUND[0], np.zeros(3)], r"foreground of image 1: shape \(3,\); allowed: \(2,\)"),
    ],
)
def test_foreground_that_does_not_fit_is_refused(hand_trace: RoutingTrace, foreground: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingStatistics().update(hand_trace, foreground)


def test_layers_may_differ_in_experts_but_batches_may_not(hand_trace: RoutingTrace) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace)
    other = RoutingTrace(RoutingContext.all_language((1, 2), torch.device("cpu")))
    other.record(Site("language_model", 0), decision_of(2, 3))
    statistics.update(other, [])
    assert [site.layer for site, _ in statistics.items()] == [0, 2]
    assert statistics[Site("language_model", 0)].tail_share is None
    other.record(SITE, decision_of(2, 3))
    with pytest.raises(ValueError, match="3 experts; allowed: 4"):
        statistics.update(other)


def test_one_expert_has_no_variance() -> None:
    trace = RoutingTrace(RoutingContext.all_language((1, 2), torch.device("cpu")))
    trace.record(SITE, decision_of(2, 1))
    statistics = RoutingStatistics()
    statistics.update(trace)
    assert statistics[SITE].histogram[0, 0] == 2


def test_parts_merged_equal_the_whole(hand_trace: RoutingTrace) -> None:
    whole, part, rest = RoutingStatistics(), RoutingStatistics(), RoutingStatistics()
    for target, foreground in ((part, FOREGROUND), (rest, [FOREGROUND[0], None])):
        target.update(hand_trace, foreground)
        whole.update(hand_trace, foreground)
    part.merge(rest)
    assert_equal(part, whole)
    with pytest.raises(ValueError, match=r"foreground_threshold: 0.1; allowed: 0.5"):
        part.merge(RoutingStatistics(foreground_threshold=0.1))


def test_npz_round_trip(hand_trace: RoutingTrace, tmp_path: Path) -> None:
    statistics = RoutingStatistics(foreground_threshold=0.3)
    statistics.update(hand_trace, FOREGROUND)
    hand_trace.record(Site("connector", 11), decision_of(10, 2))
    statistics.update(hand_trace)
    statistics.to_npz(tmp_path / "routing.npz")
    loaded = RoutingStatistics.from_npz(tmp_path / "routing.npz")
    assert loaded.foreground_threshold == 0.3
    assert_equal(loaded, statistics)
    loaded.update(hand_trace)  # still grows
    assert loaded[SITE].tokens.tolist() == [9, 15, 6]


def test_file_of_format_1_is_read_without_the_tail_sums(hand_trace: RoutingTrace, tmp_path: Path) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace)
    statistics.to_npz(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as arrays:
        old = {name: value for name, value in arrays.items() if "tail_rpv_sum" not in name and "dropped" not in name}
    np.savez(tmp_path / "old.npz", **(old | {"format": np.array(1)}))
    loaded = RoutingStatistics.from_npz(tmp_path / "old.npz")
    site = loaded[SITE]
    assert (site.mean_tail_rpv, site.mean_head_rpv) == (None, None)
    assert site.tail_share == 0.4
    assert site.dropped.sum() == 0  # there was no capacity then
    loaded.merge(statistics)
    assert loaded[SITE].mean_tail_rpv is None  # half of it is still unknown


def test_dropped_assignments_are_kept_apart(hand_trace: RoutingTrace) -> None:
    decision = hand_trace[SITE]
    dropped_TK = torch.zeros_like(decision.keep_RK)
    dropped_TK[1, 0] = True  # a vision token's first choice
    trace = RoutingTrace(hand_trace.context)
    trace.record(SITE, decision._replace(keep_RK=decision.keep_RK & ~dropped_TK, dropped_RK=dropped_TK))
    statistics = RoutingStatistics()
    statistics.update(trace)
    whole = RoutingStatistics()
    whole.update(hand_trace)
    expert = int(decision.expert_ids_RK[1, 0])
    assert statistics[SITE].dropped.nonzero() == (np.array([1]), np.array([expert]))
    assert ((statistics[SITE].load + statistics[SITE].dropped) == whole[SITE].load).all()
    # one of the vision tokens' 14 assignments (test_measures)
    assert statistics[SITE].dropped_share(Modality.VISION) == 1 / 14
    assert statistics[SITE].dropped_share(Modality.LANGUAGE) == 0


def test_nothing_round_trips_too(tmp_path: Path) -> None:
    RoutingStatistics().to_npz(tmp_path / "routing.npz")
    assert len(RoutingStatistics.from_npz(tmp_path / "routing.npz")) == 0


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", load=np.zeros(3))
    with pytest.raises(ValueError, match=r"other.npz: routing statistics of format None; allowed: 1"):
        RoutingStatistics.from_npz(tmp_path / "other.npz")


def test_threshold_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="foreground_threshold: 0; allowed: above 0"):
        RoutingStatistics(foreground_threshold=0)


def decision_of(num_tokens: int, num_experts: int) -> RoutingDecision:
    probs = torch.full((num_tokens, num_experts), 1 / num_experts)
    ids = torch.zeros(num_tokens, 1, dtype=torch.int64)
    return RoutingDecision(probs.log(), probs, ids, probs[:, :1], torch.ones(num_tokens, 1, dtype=torch.bool))


def test_images_of_a_connector_are_left_out(hand_trace: RoutingTrace) -> None:
    alone, both = RoutingStatistics(), RoutingStatistics()
    alone.update(hand_trace)
    connector = connector_trace([(1, 0, 2), (0, 0, 0)])
    for site, decision in connector.items():
        hand_trace.record(site, decision)
    both.update(hand_trace)
    assert_equal(both, alone)
    only = RoutingStatistics()
    only.update(connector)
    assert len(only) == 0


def assert_equal(left: RoutingStatistics, right: RoutingStatistics) -> None:
    assert [site for site, _ in left.items()] == [site for site, _ in right.items()]
    for site, ours in left.items():
        theirs = right[site]
        for name in ("load", "tokens", "histogram", "rpv_sum", "tail_rpv_sum", "entropy_sum", "agreement", "auc"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), err_msg=f"{site} {name}")
