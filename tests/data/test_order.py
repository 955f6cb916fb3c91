from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lvlm.data.mixture import Draw
from moe_lvlm.data.order import StepOrder

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**70))


def order_of(sizes: tuple[int, int, int, int]) -> StepOrder:
    epoch_size, micro_batch, num_micro_batches, seed = sizes
    return StepOrder(
        seed=seed, epoch_size=epoch_size, micro_batch=micro_batch, global_batch=micro_batch * num_micro_batches
    )


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, num_steps=st.integers(0, 12))
def test_nothing_is_lost_and_nothing_comes_twice_in_an_epoch(sizes: tuple[int, int, int, int], num_steps: int) -> None:
    order = order_of(sizes)
    stream = [draw for step in range(num_steps) for micro_batch in order.step(step) for draw in micro_batch]
    assert len(stream) == num_steps * order.global_batch
    assert [draw.epoch for draw in stream] == sorted(draw.epoch for draw in stream)
    per_epoch = Counter(draw.epoch for draw in stream)
    assert len(set(stream)) == len(stream)
    for epoch, count in per_epoch.items():
        assert count <= order.epoch_size
        is_last = epoch == max(per_epoch)
        assert is_last or {d.position for d in stream if d.epoch == epoch} == set(range(order.epoch_size))


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, step=st.integers(0, 30), world_size=st.sampled_from([1, 2, 3, 4]))
def test_ranks_share_out_the_same_micro_batches(sizes: tuple[int, int, int, int], step: int, world_size: int) -> None:
    epoch_size, micro_batch, num_micro_batches, seed = sizes
    order = order_of((epoch_size, micro_batch, num_micro_batches * world_size, seed))
    numbers = [order.numbers(rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [[order.step(step)[number] for number in mine] for mine in numbers]
    assert len({len(share) for share in shares}) == 1
    taken = [shares[number % world_size][number // world_size] for number in range(order.num_micro_batches)]
    assert tuple(taken) == order.step(step)


def test_a_step_is_the_same_wherever_one_begins() -> None:
    make = lambda: StepOrder(seed=3, epoch_size=7, micro_batch=2, global_batch=6)  # noqa: E731
    order = make()
    assert [order.step(step) for step in range(9)] == [make().step(step) for step in reversed(range(9))][::-1]


def test_a_micro_batch_size_changes_the_cut_alone() -> None:
    stream = {
        micro_batch: [
            draw
            for step in range(4)
            for draws in StepOrder(seed=1, epoch_size=10, micro_batch=micro_batch, global_batch=8).step(step)
            for draw in draws
        ]
        for micro_batch in (1, 2, 4, 8)
    }
    assert all(draws == stream[1] for draws in stream.values())


def test_the_permutation_is_numpys() -> None:
    # part of the promise to resumed runs: PCG64 from SeedSequence((seed, epoch)); a change breaks them
    order = StepOrder(seed=11, epoch_size=5, micro_batch=1, global_batch=10)
    expected = [
        Draw(epoch, int(position))
        for epoch in (0, 1)
        for position in np.random.Generator(np.random.PCG64(np.random.SeedSequence((11, epoch)))).permutation(5)
    ]
    assert [draws[0] for draws in order.step(0)] == expected
    assert expected[:5] != [Draw(0, draw.position) for draw in expected[5:]]
    assert order.epoch_at(3) == 6.0


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="6 is not a multiple of micro_batch"):
        StepOrder(seed=0, epoch_size=5, micro_batch=4, global_batch=6)
    with pytest.raises(ValueError, match="must be >= 1"):
        StepOrder(seed=0, epoch_size=0, micro_batch=4, global_batch=8)
    with pytest.raises(ValueError, match=r"2 micro-batch\(es\) of 4, not a multiple of the 3 processes; .* of 12"):
        StepOrder(seed=0, epoch_size=5, micro_batch=4, global_batch=8).numbers(rank=0, world_size=3)
