"""Which draws make which micro-batch: a function of seed and step, the same for every number of processes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_lvlm.data.mixture import Draw

MicroBatchDraws = tuple[Draw, ...]


class StepOrder:
    """The order of a stage.

    The draws of a stage are one stream: epoch 0 shuffled, epoch 1 shuffled, ...; step s takes the draws
    s x global_batch up to (s + 1) x global_batch of it, cut into micro-batches, which are the unit of order:
    rank r of w takes numbers r, r + w, ... A step may straddle epochs; every epoch holds each position
    once.

    seed: shuffles epoch e by PCG64 from SeedSequence((seed, e)). epoch_size: draws of an epoch (`len(dataset)`).
    """

    def __init__(self, *, seed: int, epoch_size: int, micro_batch: int, global_batch: int) -> None:
        if min(epoch_size, micro_batch, global_batch) < 1:
            raise ValueError(
                f"epoch size ({epoch_size}), micro_batch ({micro_batch}) and global_batch ({global_batch}) must be >= 1"
            )
        if global_batch % micro_batch:
            raise ValueError(f"global_batch: {global_batch} is not a multiple of micro_batch ({micro_batch})")
        self.seed = seed
        self.epoch_size = epoch_size
        self.micro_batch = micro_batch
        self.global_batch = global_batch
        self._shuffled: tuple[int, NDArray[np.int64]] | None = None  # the last epoch used; a cache, no state

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.global_batch // self.micro_batch

    def draws(self, step: int) -> list[Draw]:
        """The draws of a step (from 0), in the order of the stream."""
        first = step * self.global_batch
        return [self._draw(number) for number in range(first, first + self.global_batch)]

    def step(self, step: int) -> tuple[MicroBatchDraws, ...]:
        """All micro-batches of a step (from 0), cut from its draws in their order."""
        draws, size = self.draws(step), self.micro_batch
        return tuple(tuple(draws[start : start + size]) for start in range(0, self.global_batch, size))

    def numbers(self, *, rank: int, world_size: int) -> range:
        """The micro-batches of a step that one rank takes. Raises ValueError as `check_world_size`."""
        self.check_world_size(world_size)
        return range(rank, self.num_micro_batches, world_size)

    def check_world_size(self, world_size: int) -> None:
        """Raises ValueError unless every rank gets the same number of micro-batches."""
        if self.num_micro_batches % world_size:
            raise ValueError(
                f"global_batch: {self.global_batch} is {self.num_micro_batches} micro-batch(es) of {self.micro_batch},"
                f" not a multiple of the {world_size} processes; allowed are multiples of {self.micro_batch * world_size}"
            )

    def epoch_at(self, step: int) -> float:
        """Epochs behind us when `step` begins."""
        return step * self.global_batch / self.epoch_size

    def _draw(self, number: int) -> Draw:
        epoch, place = divmod(number, self.epoch_size)
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch))))
            self._shuffled = epoch, generator.permutation(self.epoch_size)
        return Draw(epoch, int(self._shuffled[1][place]))
