"""Which of a recipe's settings decide what is trained: two recipes that agree in them are one training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_lvlm.config.recipe import Recipe

# What another value of leaves the same model on the same data: a resumed run may have it.
_FREE = (
    "name", "output_dir", "evaluation", "parallel",
    "data.num_workers", "data.prefetch", "data.bad_sample_limit", "data.feature_cache",
)  # fmt: skip
_FREE_TRAIN = (
    "train.checkpoint", "train.log_every", "train.max_skipped_steps", "train.gradient_checkpointing", "train.hang_timeout",
)  # fmt: skip


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """The deciding settings by dotted key (`stages.0.steps`), plain JSON values. Names, folders, evaluation, topology,
    checkpoints and logging are not among them."""
    settings = _flatten(recipe.model_dump(mode="json"))
    # batching changes no loss; but capacity counts padding
    batching = ("data.batching",) if recipe.moe.capacity_factor is None else ()
    free = (*_FREE, *_FREE_TRAIN, *batching)
    return {key: value for key, value in settings if not key.startswith(free)}


def describe_change(before: Recipe, now: Recipe) -> str | None:
    """The deciding settings in which two recipes differ, in words; None if they agree."""
    old, new = training_settings(before), training_settings(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if not changed:
        return None
    return "; ".join(f"{key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in changed[:5])


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if pairs is None:
        yield prefix, values
        return
    for key, value in pairs:
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
