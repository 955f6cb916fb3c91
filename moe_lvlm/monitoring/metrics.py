"""The numbers of a logged step, of metrics.json and of checkpoints, as far as they can be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lvlm.monitoring.folder import CHECKPOINTS, METRICS
from moe_lvlm.monitoring.records import number, read_object, whole

_MANIFEST, _STATE = "manifest.json", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Of one logged step; None where it has no such number.

    dropped_share: assignments that found no room, of all. load_lowest, load_highest: assignments of the least and the
    most used expert over the even share of its layer, over all layers with experts: 1 is even, 0 unused.
    """

    time: float | None
    loss: float | None
    language_loss: float | None
    balance_loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    epoch: float | None
    dropped_share: float | None
    load_lowest: float | None
    load_highest: float | None


@dataclass(frozen=True, slots=True)
class EvaluationScore:
    """One task of metrics.json."""

    task: str
    accuracy: float
    majority: float | None
    n: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """The newest whole checkpoint. step: the run's step it was saved after. saved: Unix seconds. age: seconds."""

    name: str
    step: int | None
    saved: float
    age: float


def step_metrics(record: Mapping[str, Any]) -> StepMetrics:
    """Of a `step` event."""
    loads = [sums for sums in _by_layer(record.get("expert_load")) if len(sums) > 1 and sum(sums) > 0]
    relative = [one * len(sums) / sum(sums) for sums in loads for one in sums]
    return StepMetrics(
        **{name: number(record.get(name)) for name in ("time", "loss", "language_loss", "balance_loss")},
        **{name: number(record.get(name)) for name in ("grad_norm", "learning_rate", "epoch")},
        dropped_share=_dropped_share(record),
        load_lowest=min(relative, default=None),
        load_highest=max(relative, default=None),
    )


def _dropped_share(record: Mapping[str, Any]) -> float | None:
    """Kept assignments count in layers that can drop some."""
    dropped, kept = record.get("dropped"), record.get("expert_load")
    if not isinstance(dropped, dict) or not isinstance(kept, dict):
        return None
    lost = sum(map(sum, _by_layer(dropped)))
    total = lost + sum(map(sum, _by_layer({layer: kept.get(layer) for layer in dropped})))
    return lost / total if total else None


def _by_layer(value: Any) -> Iterator[list[float]]:
    """Counts by expert of each layer, summed over modalities; what is not such a table is left out."""
    for layer in value.values() if isinstance(value, dict) else ():
        rows = list(layer.values()) if isinstance(layer, dict) else []
        if rows and all(isinstance(row, list) for row in rows) and len({len(row) for row in rows}) == 1:
            yield [sum(number(one) or 0.0 for one in column) for column in zip(*rows, strict=True)]


def read_scores(run: Path) -> tuple[EvaluationScore, ...]:
    """The scores of metrics.json, in its order; empty without one."""
    metrics = read_object(run / METRICS) or {}
    rows = metrics.get("eval")
    return tuple(
        EvaluationScore(task, accuracy, number(row.get("majority")), whole(row.get("n")))
        for task, row in (rows.items() if isinstance(rows, dict) else ())
        if isinstance(row, dict) and (accuracy := number(row.get("accuracy"))) is not None
    )


def newest_checkpoint(run: Path, now: float) -> CheckpointFacts | None:
    """The checkpoint with a manifest that was saved after the most steps; None if there is none."""
    found = []
    for manifest in (run / CHECKPOINTS).glob(f"*/{_MANIFEST}"):
        folder = manifest.parent
        if folder.name.startswith("."):
            continue  # being written
        try:
            saved = manifest.stat().st_mtime
        except FileNotFoundError:
            continue  # let go this moment
        step = whole((read_object(folder / _STATE) or {}).get("global_step"))
        facts = CheckpointFacts(name=folder.name, step=step, saved=saved, age=max(now - saved, 0.0))
        found.append((-1 if step is None else step, folder.name, facts))
    return max(found, key=lambda one: one[:2])[2] if found else None
