"""A rank's micro-batches, step by step."""

from __future__ import annotations

import faulthandler
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from moe_lvlm.data.balance import StepBalance
from moe_lvlm.data.collator import Batch, pin_batch
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

    def pin_memory(self) -> MicroBatch:
        """The same in memory that a GPU copies from beside the host's work. torch's loader calls it by this name."""
        return replace(self, batch=pin_batch(self.batch))


class StepLoader:
    """Loads the micro-batches that a rank takes in each step.

    Bad records never stop it and are never replaced. num_workers: processes that load ahead, `prefetch` micro-batches
    each; 0 loads in this process. They live as long as what `steps` gives. What is loaded does not depend on either, and
    no global random state is touched. balance: arranges each step's draws; None takes them as they come.
    has_pinned_memory: what workers load is copied to a GPU from there (`to_device`).

    seconds_waited: how long `steps` has taken to hand out micro-batches, in all.
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
        balance: StepBalance | None = None,
        has_pinned_memory: bool = False,
    ) -> None:
        order.check_world_size(world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the number of processes ({world_size})")
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.seconds_waited = 0.0
        self._loading = _MicroBatches(dataset, order, collator, balance)
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._has_pinned_memory = has_pinned_memory

    def steps(self, start: int, stop: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each step, start <= step < stop; steps count from 0 in the stage."""
        mine = self.order.numbers(rank=self.rank, world_size=self.world_size)
        loaded = self._loaded(Place(step, number) for step in range(start, stop) for number in mine)
        for _ in range(start, stop):
            began = time.monotonic()
            micro_batches = list(islice(loaded, len(mine)))
            self.seconds_waited += time.monotonic() - began
            yield micro_batches

    def _loaded(self, wanted: Iterable[Place]) -> Iterator[MicroBatch]:
        if self._num_workers == 0:
            return (self._loading[place] for place in wanted)
        loader = DataLoader(
            self._loading,
            sampler=wanted,  # one item is one whole micro-batch
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch,
            pin_memory=self._has_pinned_memory,
            worker_init_fn=_ignore_interrupts,
            # without one of its own the loader draws its workers' seed from the global generator
            generator=torch.Generator().manual_seed(self.order.seed),
        )
        with _holding_back():
            return iter(loader)


class Place(NamedTuple):
    """A micro-batch: the step, and its number in it over all ranks."""

    step: int
    number: int


class _MicroBatches(Dataset[MicroBatch]):
    def __init__(
        self,
        dataset: Samples,
        order: StepOrder,
        collator: Callable[[Sequence[Sample]], Batch],
        balance: StepBalance | None,
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._collator = collator
        self._balance = balance
        # the last step arranged, which gives more than one micro-batch to a rank; a cache, no state
        self._arranged: tuple[int, tuple[MicroBatchDraws, ...]] | None = None

    def __getitem__(self, place: Place) -> MicroBatch:
        samples: list[Sample] = []
        bad: list[BadRecordError] = []
        for draw in self._step(place.step)[place.number]:
            try:
                samples.append(self._dataset[draw])
            except BadRecordError as error:
                bad.append(BadRecordError(*error.args))  # without its traceback, which holds on to the image
        return MicroBatch(self._collator(samples), tuple(bad), len(samples))

    def _step(self, step: int) -> tuple[MicroBatchDraws, ...]:
        if self._arranged is None or self._arranged[0] != step:
            if self._balance is None:
                arranged = self._order.step(step)
            else:
                arranged = self._balance.micro_batches(self._order.draws(step), self._order.num_micro_batches)
            self._arranged = step, arranged
        return self._arranged[1]


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
