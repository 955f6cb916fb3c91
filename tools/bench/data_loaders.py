"""Loaders that are timed, and what their batches waste."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.balance import group_by_length, spread_evenly, step_balance, waste
from moe_lvlm.data.loader import MicroBatch, StepLoader
from moe_lvlm.models.processor import Processor
from moe_lvlm.routing.types import Modality
from moe_lvlm.training.data import StageData, open_stage_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """A way to make batches: keys of `data`. is_cached: features from a cache in the place of images."""

    name: str
    label: str
    is_packed: bool
    is_balanced: bool = False
    is_cached: bool = False


BATCHINGS: tuple[Batching, ...] = (
    Batching(name="padded", label="padded", is_packed=False),
    Batching(name="padded_grouped", label="padded, grouped by length", is_packed=False, is_balanced=True),
    Batching(name="packed", label="packed", is_packed=True),
    Batching(name="packed_balanced", label="packed, balanced", is_packed=True, is_balanced=True),
    Batching(name="cached", label="packed, features from a cache", is_packed=True, is_cached=True),
)


def choose_batchings(names: str | None) -> tuple[Batching, ...]:
    """Those that a comma-separated list names, in the order of BATCHINGS; all but `padded_grouped` without one.

    Raises:
        ValueError: a name that does not exist.
    """
    known = [one.name for one in BATCHINGS]
    wanted = set(known) - {"padded_grouped"} if names is None else {name.strip() for name in names.split(",")}
    if unknown := sorted(wanted.difference(known)):
        raise ValueError(f"--batchings: {', '.join(unknown)}; allowed: {', '.join(known)}")
    return tuple(one for one in BATCHINGS if one.name in wanted)


def open_stage(recipe: Recipe, stage: int, processor: Processor, batching: Batching, cache: str | None) -> StageData:
    """cache: the folder of features, for the batching that wants one."""
    changes = {
        "batching": "packed" if batching.is_packed else "padded",
        "balance": batching.is_balanced,
        "feature_cache": cache if batching.is_cached else None,
    }
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})
    return open_stage_data(recipe, stage, processor)


class LoaderRun:
    """The loader of rank 0 of so many, with so many workers; every call loads the same micro-batches.

    samples, images, tokens, bad: of those that are timed, once it was called.
    """

    def __init__(self, data: StageData, *, ranks: int, workers: int, skipped: int, micro_batches: int) -> None:
        """skipped: micro-batches before those that are timed, while workers start and load ahead of the clock."""
        self._data, self._ranks, self._workers = data, ranks, workers
        self._skipped, self._last = skipped, skipped + micro_batches
        self._steps = -(-self._last // (data.order.num_micro_batches // ranks))
        self.samples = self.images = self.tokens = self.bad = 0

    def seconds(self) -> float:
        """Of the micro-batches behind the first few."""
        recipe, data = self._data.recipe, self._data
        loader = StepLoader(
            data.dataset,
            data.order,
            data.collator,
            world_size=self._ranks,
            num_workers=self._workers,
            prefetch=recipe.data.prefetch,
            balance=step_balance(recipe.data, data.dataset.length),
        )
        self.samples = self.images = self.tokens = self.bad = 0
        start = elapsed = 0.0
        stream = (one for step in loader.steps(0, self._steps) for one in step)
        for number, micro_batch in enumerate(stream, start=1):
            if number > self._skipped:
                self._count_in(micro_batch)
            if number == self._skipped:
                start = time.perf_counter()
            if number == self._last:
                elapsed = time.perf_counter() - start
                break
        stream.close()
        return elapsed

    def _count_in(self, micro_batch: MicroBatch) -> None:
        batch = micro_batch.batch
        pictures = batch.get("image_features", batch.get("pixel_values"))
        self.samples += micro_batch.num_samples
        self.images += 0 if pictures is None else pictures.shape[0]
        self.tokens += int((batch["routing"].modality_BS != Modality.PADDING).sum())
        self.bad += len(micro_batch.bad)


def measure_waste(data: StageData, *, steps: int, ranks: int) -> dict[str, tuple[float, float]]:
    """{batching: (share of padding, imbalance)} over the first steps, by the lengths of samples alone.

    Imbalance: the most positions of a process over the mean, at the micro-batches that processes work on at once.
    """
    found: dict[str, list[list[int]]] = {one.name: [] for one in BATCHINGS if not one.is_cached}
    size, count = data.order.micro_batch, data.order.num_micro_batches
    for step in range(steps):
        lengths = [data.dataset.length(draw) for draw in data.order.draws(step)]
        in_order = [lengths[start : start + size] for start in range(0, len(lengths), size)]
        found["padded"] += in_order
        found["packed"] += in_order
        found["padded_grouped"] += _pick(lengths, group_by_length(lengths, count))
        found["packed_balanced"] += _pick(lengths, spread_evenly(lengths, count))
    is_packed = {one.name: one.is_packed for one in BATCHINGS}
    return {name: waste(micro_batches, ranks, is_packed[name]) for name, micro_batches in found.items()}


def _pick(lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[lengths[place] for place in places] for places in bins]
