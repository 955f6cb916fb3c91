"""Which micro-batches a run will meet, by the lengths that its samples are taken to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe_lvlm.estimation.shape import BatchShape

_STEPS = 16  # that are drawn at least


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLengths:
    """Text of samples, log-normal, and their images; the defaults are near LLaVA-mix-665k's.

    mean_text, spread: of a sample's text in tokens, and of its logarithm. text_only: share of samples without an image.
    answers: share of the text that has a loss. images: of each other sample. max_length: where samples are cut.
    """

    mean_text: float = 190.0
    spread: float = 1.1
    text_only: float = 0.06
    answers: float = 0.5
    images: int = 1
    max_length: int = 2048

    def __post_init__(self) -> None:
        for name, low, high in (("mean_text", 1, 1e6), ("spread", 0, 5), ("text_only", 0, 1), ("answers", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)}; allowed: {low} to {high:g}")
        if self.images < 0 or self.max_length < 8:
            raise ValueError(f"images: {self.images}, max_length: {self.max_length}; allowed: 0 and 8 or above")

    def draw(self, count: int, visual_tokens: int, generator: np.random.Generator) -> np.ndarray:
        """[count, 2]: all tokens of each sample, and its images."""
        mean = np.log(self.mean_text) - self.spread**2 / 2
        text = np.clip(generator.lognormal(mean, self.spread, size=count), 4, None).round().astype(np.int64)
        images = np.where(generator.random(count) < self.text_only, 0, self.images)
        total = np.minimum(text + images * visual_tokens, max(self.max_length, visual_tokens * self.images + 4))
        return np.stack((total, images), axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """typical: a micro-batch of the mean size, which time goes by. largest: of a thousand the largest, which must fit.
    imbalance: how much longer than the mean the largest of the processes' micro-batches is, on average, by positions.
    padding: share of positions."""

    typical: BatchShape
    largest: BatchShape
    imbalance: float
    padding: float


def expect_micro_batches(
    lengths: SampleLengths,
    *,
    visual_tokens: int,
    micro_batch: int,
    global_batch: int,
    world_size: int,
    batching: Literal["padded", "packed"],
    balance: bool,
    tail_share: float,
    seed: int = 0,
) -> MicroBatches:
    """Draw steps and cut them into micro-batches as the loader does: in the order of draws, or balanced by length."""
    generator = np.random.default_rng(seed)
    is_packed = batching == "packed"
    batches: list[np.ndarray] = []
    slowest: list[float] = []
    for _ in range(max(_STEPS, -(-1000 * micro_batch // global_batch))):
        drawn = lengths.draw(global_batch, visual_tokens, generator)
        step = _cut(drawn, micro_batch, is_packed=is_packed, balance=balance)
        sizes = [_positions(one, is_packed) for one in step]
        rounds = [sizes[start : start + world_size] for start in range(0, len(sizes), world_size)]
        slowest += [max(one) / (sum(one) / len(one)) for one in rounds]
        batches += step
    sizes = [_positions(one, is_packed) for one in batches]
    tokens = [int(one[:, 0].sum()) for one in batches]
    middle = batches[int(np.argmin(np.abs(np.array(sizes) - np.mean(sizes))))]
    return MicroBatches(
        typical=_shape(middle, lengths, visual_tokens, is_packed, tail_share),
        largest=_shape(batches[int(np.argmax(sizes[:1000]))], lengths, visual_tokens, is_packed, tail_share),
        imbalance=float(np.mean(slowest)),
        padding=1 - sum(tokens) / sum(sizes),
    )


def _cut(drawn: np.ndarray, micro_batch: int, *, is_packed: bool, balance: bool) -> list[np.ndarray]:
    if balance and is_packed:
        # longest first, there and back again: near equal sums
        order = np.argsort(-drawn[:, 0], kind="stable")
        count = len(drawn) // micro_batch
        rows = [order[start : start + count] for start in range(0, len(order), count)]
        return list(drawn[np.stack([row if turn % 2 == 0 else row[::-1] for turn, row in enumerate(rows)], axis=1)])
    if balance:
        drawn = drawn[np.argsort(-drawn[:, 0], kind="stable")]
    return [drawn[start : start + micro_batch] for start in range(0, len(drawn), micro_batch)]


def _positions(batch: np.ndarray, is_packed: bool) -> int:
    return int(batch[:, 0].sum() if is_packed else batch[:, 0].max() * len(batch))


def _shape(
    batch: np.ndarray, lengths: SampleLengths, visual_tokens: int, is_packed: bool, tail_share: float
) -> BatchShape:
    total: Sequence[int] = [int(one) for one in batch[:, 0]]
    images = int(batch[:, 1].sum())
    text = sum(total) - images * visual_tokens
    return BatchShape(
        sample_lengths=tuple(total),
        num_images=images,
        supervised=max(round(text * lengths.answers), 1),
        padded_to=None if is_packed else max(total),
        tail_share=tail_share,
    )
