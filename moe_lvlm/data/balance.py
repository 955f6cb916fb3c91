"""Which samples of a step go together, by their lengths, so that no process waits for another and little is padding.

Samples are named by their place in the step, 0, 1, ...; every micro-batch has as many. What comes out depends on the
lengths alone, so it is the same on every process and for every number of processes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from moe_lvlm.config.recipe import DataSettings
from moe_lvlm.data.mixture import Draw
from moe_lvlm.data.order import MicroBatchDraws

# Exchanges of samples after the first spreading: at most so many, each of which makes the heaviest micro-batch lighter
# by this share of it.
_MAX_EXCHANGES = 100
_LEAST_GAIN = 1e-4

Arrange = Callable[[Sequence[int], int], list[list[int]]]
"""(length of each sample, number of micro-batches) -> places of the samples of each micro-batch."""


def spread_evenly(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Micro-batches with nearly the same number of tokens, for packed rows.

    Longest first, each into the lightest micro-batch with room; then the heaviest exchanges samples with the others as
    long as that makes it lighter. The heaviest comes first, so those of near weight, which processes
    work on at the same time, are neighbours.

    Raises:
        ValueError: the samples do not divide among the bins.
    """
    room = _samples_each(lengths, num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lightest = [(0, number) for number in range(num_bins)]
    for place in _longest_first(lengths):
        weight, number = heapq.heappop(lightest)
        bins[number].append(place)
        if len(bins[number]) < room:
            heapq.heappush(lightest, (weight + lengths[place], number))
    _exchange(bins, lengths)
    bins.sort(key=lambda places: (-_weight(places, lengths), min(places)))
    return [sorted(places) for places in bins]


def group_by_length(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Micro-batches of samples of near length, for padded rows: the least padding that there is. The longest come first.

    A step's slowest micro-batch is that of the longest sample, however samples are grouped; so nothing is lost by leaving
    the longest together, and the others get shorter.

    Raises:
        ValueError: the samples do not divide among the bins.
    """
    size = _samples_each(lengths, num_bins)
    order = _longest_first(lengths)
    return [sorted(order[start : start + size]) for start in range(0, len(order), size)]


class StepBalance:
    """Makes a step's micro-batches by the lengths of its samples.

    length_of: tokens of a draw's sample, 0 for a bad record.
    """

    def __init__(self, length_of: Callable[[Draw], int], arrange: Arrange) -> None:
        self._length_of = length_of
        self._arrange = arrange

    def micro_batches(self, draws: Sequence[Draw], num_micro_batches: int) -> tuple[MicroBatchDraws, ...]:
        """The draws of a step, arranged; within a micro-batch in their order."""
        bins = self._arrange([self._length_of(draw) for draw in draws], num_micro_batches)
        return tuple(tuple(draws[place] for place in places) for places in bins)


def step_balance(settings: DataSettings, length_of: Callable[[Draw], int]) -> StepBalance | None:
    """What `data.balance` asks for: tokens spread evenly over packed rows, near lengths together in padded ones."""
    if not settings.balance:
        return None
    return StepBalance(length_of, spread_evenly if settings.batching == "packed" else group_by_length)


def waste(lengths_by_micro_batch: Sequence[Sequence[int]], world_size: int, is_packed: bool) -> tuple[float, float]:
    """Share of padding among the positions of one or more steps, and imbalance between processes.

    lengths_by_micro_batch: tokens of each sample, 0 for a bad record; process r of w takes micro-batches r, r + w, ...
    Imbalance: processes work on w micro-batches at a time and meet after each (exchanges of experts, sums of
    gradients), so it is the sum over these rounds of the most positions that one has, over that of the mean.

    Raises:
        ValueError: micro-batches that do not divide among the processes.
    """
    num_micro_batches = len(lengths_by_micro_batch)
    if not num_micro_batches or num_micro_batches % world_size:
        raise ValueError(f"{num_micro_batches} micro-batches do not divide among {world_size} processes")
    tokens = sum(sum(lengths) for lengths in lengths_by_micro_batch)
    # a micro-batch without a good record is one padding token
    positions = [max(_positions(lengths, is_packed=is_packed), 1) for lengths in lengths_by_micro_batch]
    slowest = sum(max(positions[start : start + world_size]) for start in range(0, num_micro_batches, world_size))
    return 1 - tokens / sum(positions), slowest * world_size / sum(positions)


def _positions(lengths: Sequence[int], *, is_packed: bool) -> int:
    if is_packed:
        return sum(lengths)
    return max(lengths, default=0) * sum(length > 0 for length in lengths)


def _samples_each(lengths: Sequence[int], num_bins: int) -> int:
    if num_bins < 1 or len(lengths) % num_bins:
        raise ValueError(f"{len(lengths)} samples do not divide among {num_bins} micro-batches")
    return len(lengths) // num_bins


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))


def _weight(places: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[place] for place in places)


def _exchange(bins: list[list[int]], lengths: Sequence[int]) -> None:
    """In place: as long as the heaviest gets lighter by giving one sample for a shorter one of another bin."""
    weights = [_weight(places, lengths) for places in bins]
    for _ in range(_MAX_EXCHANGES):
        heavy = max(range(len(bins)), key=lambda number: (weights[number], -number))
        best: tuple[int, int, int, int] | None = None
        for other, places in enumerate(bins):
            gap = weights[heavy] - weights[other]
            for i, mine in enumerate(bins[heavy]):
                for j, yours in enumerate(places):
                    given = lengths[mine] - lengths[yours]
                    if 0 < given < gap:
                        # the heavier of the two afterwards
                        option = (max(weights[heavy] - given, weights[other] + given), other, i, j)
                        best = option if best is None else min(best, option)
        if best is None or weights[heavy] - best[0] < _LEAST_GAIN * weights[heavy]:
            return
        _, other, i, j = best
        given = lengths[bins[heavy][i]] - lengths[bins[other][j]]
        bins[heavy][i], bins[other][j] = bins[other][j], bins[heavy][i]
        weights[heavy] -= given
        weights[other] += given
