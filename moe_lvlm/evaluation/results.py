"""What an evaluation leaves in the run's folder, and the table that it prints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_lvlm.analysis.run_folder import further_numbers
from moe_lvlm.evaluation.metrics import TaskScore

METRICS = "metrics.json"
PREDICTIONS = "predictions.jsonl"
ROUTING = "routing.npz"
EXAMPLES = "examples.npz"
PATHS = "paths.json"
ADAPTERS = "adapters.json"
INSTRUCTIONS = "instructions.json"


def evaluation_folder(run: Path, name: str) -> Path:
    """Where the results of one evaluation set lie in a run."""
    return run / "eval" / name


@contextmanager
def replaced_path(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends well; a crash leaves the old file whole.
    The folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def update_metrics(run: Path, scores: Mapping[str, TaskScore]) -> None:
    """Put scores into the run's metrics.json under "eval". Other tasks and other keys stay.

    Raises:
        ValueError: the file is there but is not a JSON object, or its "eval" is none.
    """
    path = run / METRICS
    metrics = _read_metrics(path)
    metrics["eval"] = metrics.get("eval", {}) | {task: score.to_dict() for task, score in scores.items()}
    with replaced_path(path) as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _read_metrics(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); mend or remove it") from error
    if not isinstance(metrics, dict) or not isinstance(metrics.get("eval", {}), dict):
        raise ValueError(f'{path}: allowed: a JSON object whose "eval" is an object; mend or remove it')
    return metrics


def print_scores(scores: Mapping[str, TaskScore], *, console: Console | None = None) -> None:
    """A table: each task's accuracy beside its majority baseline, its number of questions and the metric's further
    numbers, those of single categories left out."""
    table = Table("task", "accuracy", "majority", "n")
    for column in table.columns[1:]:
        column.justify = "right"
    has_more = any(score.details for score in scores.values())
    if has_more:
        table.add_column("more")
    for task, score in scores.items():
        row = [task, f"{score.accuracy:.3f}", f"{score.majority:.3f}", str(score.n)]
        table.add_row(*row, *([dict(further_numbers(score.details))[""]] if has_more else []))
    (console or Console()).print(table)
