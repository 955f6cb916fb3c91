"""A rank's micro-batches, step by step."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from moe_lvlm.data.collator import Batch
from moe_lvlm.data.errors import BadRecordError
from moe_lvlm.data.mixture import Draw
from moe_lvlm.data.order import MicroBatchDraws, StepOrder
from moe_lvlm.data.sample import Sample

# Ctrl-C, torchrun's SIGTERM and a batch system's signal reach all processes; the trainer, which saves and leaves, still
# needs its workers. They end when the loader says so, or when their parent is gone.
_FOR_THE_TRAINER = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
# A worker that gets it writes its stacks to stderr, and goes on.
STACKS_SIGNAL = signal.SIGQUIT


class Samples(Protocol):
    """What the loader reads: `MixtureDataset`, or anything that gives a sample for a draw or raises BadRecordError."""

    def __getitem__(self, draw: Draw) -> Sample: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward's worth of data.

    bad: records drawn for it that could not be used; it is smaller by them. num_samples: those it holds, 0 for an
    empty batch (see `Collator`).
    """

    batch: Batch
    bad: tuple[BadRecordError, ...]
    num_samples: int

    @property
    def num_seen(self) -> int:
        """Draws that went into it, bad ones included."""
        return self.num_samples + len(self.bad)


class StepLoader:
    """Loads the micro-batches that a rank takes in each step.

    Bad records never stop it and are never replaced. num_workers: processes that load ahead, `prefetch` micro-batches
    each; 0 loads in this process. What is loaded does not depend on either, and no global random state is touched.
    """

    def __init__(
        self,
        dataset: Samples,
        order: StepOrder,
        collator: Callable[[Sequence[Sample]], Batch],
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        order.check_world_size(world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the number of processes ({world_size})")
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self._loading = _MicroBatches(dataset, collator)
        self._num_workers = num_workers
        self._prefetch = prefetch

    def steps(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each step, start <= step < stop; steps count from 0 in the stage."""
        loaded = self._loaded(draws for step in range(start, stop) for draws in self._draws(step))
        for _ in range(start, stop):
            yield list(islice(loaded, self.order.num_micro_batches // self.world_size))

    def _draws(self, step: int) -> tuple[MicroBatchDraws, ...]:
        return self.order.rank_step(step, rank=self.rank, world_size=self.world_size)

    def _loaded(self, wanted: Iterable[MicroBatchDraws]) -> Iterator[MicroBatch]:
        if self._num_workers == 0:
            return (self._loading[draws] for draws in wanted)
        loader = DataLoader(
            self._loading,
            sampler=wanted,  # one item is one whole micro-batch
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch,
            worker_init_fn=_ignore_interrupts,
            # without one of its own the loader draws its workers' seed from the global generator
            generator=torch.Generator().manual_seed(self.order.seed),
        )
        with _holding_back():
            return iter(loader)


class _MicroBatches(Dataset[MicroBatch]):
    def __init__(self, dataset: Samples, collator: Callable[[Sequence[Sample]], Batch]) -> None:
        self._dataset = dataset
        self._collator = collator

    def __getitem__(self, draws: MicroBatchDraws) -> MicroBatch:
        samples: list[Sample] = []
        bad: list[BadRecordError] = []
        for draw in draws:
            try:
                samples.append(self._dataset[draw])
            except BadRecordError as error:
                bad.append(BadRecordError(*error.args))  # without its traceback, which holds on to the image
        return MicroBatch(self._collator(samples), tuple(bad), len(samples))


@contextmanager
def _holding_back() -> Iterator[None]:
    """Processes that are started meanwhile get none of the trainer's signals before they can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_interrupts(worker: int) -> None:
    for number in _FOR_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL, file=2)
