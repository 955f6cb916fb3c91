"""Samples of a step that go together: against brute force, and on lengths as LLaVA's."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lvlm.config.recipe import DataSettings
from moe_lvlm.data.balance import StepBalance, group_by_length, spread_evenly, step_balance, waste
from moe_lvlm.data.mixture import Draw

LENGTHS = st.integers(1, 4).flatmap(
    lambda bins: st.tuples(
        st.just(bins),
        st.integers(1, 5).flatmap(lambda n: st.lists(st.integers(0, 900), min_size=bins * n, max_size=bins * n)),
    )
)


@settings(max_examples=150, deadline=None)
@given(problem=LENGTHS)
def test_every_sample_once_and_as_many_in_each(problem: tuple[int, list[int]]) -> None:
    num_bins, lengths = problem
    for arrange in (spread_evenly, group_by_length):
        bins = arrange(lengths, num_bins)
        assert sorted(place for places in bins for place in places) == list(range(len(lengths)))
        assert {len(places) for places in bins} == {len(lengths) // num_bins}
        assert all(places == sorted(places) for places in bins)


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=8, max_size=8))
def test_two_bins_are_near_the_best_there_is(lengths: list[int]) -> None:
    sums = [abs(sum(lengths) - 2 * sum(lengths[place] for place in one)) for one in combinations(range(8), 4)]
    first, second = (sum(lengths[place] for place in places) for places in spread_evenly(lengths, 2))
    assert first >= second
    # no exchange of two samples makes it better, which leaves little to gain
    assert min(sums) <= first - second <= min(sums) + 0.1 * sum(lengths)


def test_spreading_by_hand() -> None:
    # 9 + 1 and 8 + 2 and 5 + 5: longest first into the lightest with room
    assert spread_evenly([1, 9, 5, 8, 2, 5], 3) == [[0, 1], [2, 5], [3, 4]]
    # alone in a micro-batch there is nothing to spread: the heaviest first, so that neighbours are alike
    assert spread_evenly([3, 9, 1, 8], 4) == [[1], [3], [0], [2]]


def test_an_exchange_mends_what_the_greedy_way_leaves() -> None:
    # greedily [10, 6, 6] and [9, 8, 1], 22 and 18; then 10 goes for 8
    bins = spread_evenly([10, 9, 8, 6, 6, 1], 2)
    assert sorted(sum([10, 9, 8, 6, 6, 1][place] for place in places) for places in bins) == [20, 20]


def test_grouping_by_hand() -> None:
    assert group_by_length([1, 9, 5, 8, 2, 5], 3) == [[1, 3], [2, 5], [0, 4]]


@settings(max_examples=60, deadline=None)
@given(problem=LENGTHS, seed=st.integers(0, 99))
def test_no_other_grouping_has_less_padding(problem: tuple[int, list[int]], seed: int) -> None:
    num_bins, lengths = problem
    generator = np.random.default_rng(seed)
    other = generator.permutation(len(lengths)).reshape(num_bins, -1).tolist()
    grouped = group_by_length(lengths, num_bins)

    def positions(bins: list[list[int]]) -> int:
        return sum(len(places) * max(lengths[place] for place in places) for places in bins)

    assert positions(grouped) <= positions(other)


def test_samples_that_do_not_divide_are_refused() -> None:
    for arrange in (spread_evenly, group_by_length):
        with pytest.raises(ValueError, match="5 samples do not divide among 2 micro-batches"):
            arrange([1] * 5, 2)
    with pytest.raises(ValueError, match="3 micro-batches do not divide among 2 processes"):
        waste([[1], [1], [1]], 2, False)
    with pytest.raises(ValueError, match="0 micro-batches do not divide"):
        waste([], 2, False)


def test_waste_by_hand() -> None:
    # padded rows: 2 x 6, 2 x 4, 1 x 5 (the other record is bad), and one padding token for nothing good
    steps = [[6, 2], [4, 4], [5, 0], [0, 0]]
    padding, imbalance = waste(steps, 2, False)
    assert padding == pytest.approx(1 - 21 / 26)
    assert imbalance == pytest.approx((12 + 5) / ((12 + 8) / 2 + (5 + 1) / 2))
    padding, imbalance = waste(steps, 2, True)
    assert padding == pytest.approx(1 - 21 / 22)
    assert imbalance == pytest.approx((8 + 5) / ((8 + 8) / 2 + (5 + 1) / 2))
    assert waste(steps, 1, True)[1] == 1


def llava_lengths(count: int, seed: int) -> list[int]:
    """As LLaVA-1.5's mixture of 665k: 6 % text alone, some of it long; a picture is 576 tokens; short and long talks."""
    generator = np.random.default_rng(seed)
    kind = generator.choice(4, size=count, p=[0.06, 0.24, 0.50, 0.20])
    text = np.select(
        [kind == 0, kind == 1, kind == 2],
        [
            generator.lognormal(6.4, 0.7, count),
            generator.lognormal(5.6, 0.35, count),
            generator.lognormal(4.6, 0.8, count),
        ],
        generator.lognormal(3.9, 0.3, count),
    )
    lengths = np.minimum(text + np.where(kind == 0, 0, 576), 2048).astype(int) + 30
    return [int(length) for length in lengths]


@pytest.mark.parametrize("micro_batch", [4, 16])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_goals_on_lengths_as_llavas(micro_batch: int, accumulation: int) -> None:
    """8 processes: at most 2 % of padding and 1.03 of imbalance, packed and balanced; and what is behind the others."""
    world = 8
    num_bins = world * accumulation
    random, grouped, packed, balanced = [], [], [], []
    for step in range(10):
        lengths = llava_lengths(num_bins * micro_batch, step)
        cut = [list(range(start, start + micro_batch)) for start in range(0, len(lengths), micro_batch)]
        for kept, bins in (
            (random, cut),
            (grouped, group_by_length(lengths, num_bins)),
            (packed, cut),
            (balanced, spread_evenly(lengths, num_bins)),
        ):
            kept += [[lengths[place] for place in places] for places in bins]
    assert waste(balanced, world, True)[0] == 0
    assert waste(balanced, world, True)[1] <= 1.03 < waste(packed, world, True)[1]
    assert waste(grouped, world, False)[0] < waste(random, world, False)[0] / 2


def test_a_step_is_arranged_by_its_lengths() -> None:
    draws = [Draw(2, position) for position in (5, 0, 7, 3)]
    lengths = dict(zip(draws, (4, 1, 9, 9), strict=True))
    balance = StepBalance(lengths.__getitem__, group_by_length)
    assert balance.micro_batches(draws, 2) == ((draws[2], draws[3]), (draws[0], draws[1]))


def test_what_the_recipe_asks_for() -> None:
    draws = [Draw(0, length) for length in (1, 9, 5, 8, 2, 5)]

    def arranged(**fields: object) -> list[list[int]] | None:
        balance = step_balance(DataSettings.model_validate(fields), lambda draw: draw.position)
        made = None if balance is None else balance.micro_batches(draws, 3)
        return None if made is None else [[draw.position for draw in one] for one in made]

    assert arranged() is None
    assert arranged(batching="packed") is None
    assert arranged(batching="packed", balance=True) == [[1, 9], [5, 5], [8, 2]]
    assert arranged(balance=True) == [[9, 8], [5, 5], [1, 2]]
