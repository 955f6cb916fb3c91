"""A run's status on a terminal: a page for one run, a line a run for several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_lvlm.monitoring.attempts import Attempt
from moe_lvlm.monitoring.folder import BAD_SAMPLES
from moe_lvlm.monitoring.metrics import StepMetrics
from moe_lvlm.monitoring.progress import Progress
from moe_lvlm.monitoring.spans import clock, figure, names, span
from moe_lvlm.monitoring.state import CANCELLED, DONE, FAILED, GAVE_UP, RUNNING, SILENT
from moe_lvlm.monitoring.status import RunStatus

_STYLES = {RUNNING: "green", DONE: "green", SILENT: "yellow", FAILED: "red", GAVE_UP: "red", CANCELLED: "red"}
_BAR = 32
_NUM_SCORES, _NUM_ATTEMPTS = 12, 12


def status_page(status: RunStatus) -> RenderableType:
    """All of one run."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(overflow="fold")
    for label, value in _rows(status):
        rows.add_row(label, Text(value) if isinstance(value, str) else value)
    parts: list[RenderableType] = [_title(status), rows]
    if status.attempts:
        parts += ["", *_attempts(status)]
    if status.excluded:
        parts += ["", Text(f"excluded nodes: {names(status.excluded, 20)}")]
    if status.hints:
        parts += ["", *(_line(f"- {hint}") for hint in status.hints)]
    parts += [Text(f"unreadable: {problem}", style="yellow") for problem in status.problems]
    return Group(*parts)


def status_table(statuses: Sequence[RunStatus]) -> RenderableType:
    """A line a run; the folder that all lie in stands above."""
    above = os.path.commonpath([os.path.dirname(status.path) for status in statuses])  # noqa: PTH120
    table = Table("run", "state", "stage", "step", "left", "loss", "checkpoint", "restarts", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"  # a name can be copied
    for column in (3, 4, 5, 6, 7):
        table.columns[column].justify = "right"
    for status in statuses:
        progress = status.progress
        table.add_row(
            Text(os.path.relpath(status.path, above or None)),
            Text(status.state, style=_STYLES.get(status.state, "")),
            Text(_stage_name(progress)),
            _of(progress.step, progress.steps),
            span(progress.run_seconds) if status.state == RUNNING else "-",
            figure(None if status.metrics is None else status.metrics.loss),
            "-" if status.checkpoint is None else f"{span(status.checkpoint.age)} old",
            str(status.restarts),
        )
    return Group(_line(f"{above}:"), table) if above else table


def _line(text: str) -> Text:
    """A line that the terminal breaks, not we: commands and paths in it can be copied."""
    return Text(text, no_wrap=True, overflow="ignore")


def _title(status: RunStatus) -> Text:
    title = _line("")
    title.append(status.path, style="bold").append("  ")
    title.append(status.state, style=f"bold {_STYLES.get(status.state, '')}".strip())
    if status.reason and status.state not in (RUNNING, DONE):
        title.append(f" ({status.reason})")
    if status.since is not None:
        ago = span(status.time - status.since)
        title.append(f" since {clock(status.since, now=status.time)} ({ago})")
    if status.state == SILENT:
        title.append(f"; it counts as silent after {span(status.silence_limit)} without a word")
    return title


def _rows(status: RunStatus) -> Iterator[tuple[str, RenderableType]]:
    progress = status.progress
    if progress.current is not None:
        stage = progress.stages[progress.current]
        yield "stage", _bar(stage.step, stage.steps, _stage_name(progress))
    if progress.stages:
        yield "run", _bar(progress.step, progress.steps)
    if progress.steps_per_second is not None:
        tokens = progress.tokens_per_second
        yield "speed", _speed(progress.steps_per_second) + ("" if tokens is None else f", {tokens:,.0f} tokens/s")
    if progress.stage_seconds is not None and status.state != DONE:
        yield "left", _left(status)
    if status.metrics is not None:
        yield from _metric_rows(status.metrics)
    checkpoint = status.checkpoint
    if checkpoint is not None:
        step = "" if checkpoint.step is None else f", step {checkpoint.step:,} of the run"
        yield "checkpoint", f"{checkpoint.name}{step}, {span(checkpoint.age)} old"
    if status.bad_samples:
        yield "bad samples", f"{status.bad_samples} (in {BAD_SAMPLES})"
    if status.skipped_steps:
        yield "skipped steps", f"{status.skipped_steps} (their gradients were not finite)"
    for place, score in enumerate(status.scores[:_NUM_SCORES]):
        majority = "" if score.majority is None else f" (majority {score.majority:.3f})"
        yield "" if place else "scores", f"{score.task}  {score.accuracy:.3f}{majority}"
    if len(status.scores) > _NUM_SCORES:
        yield "", f"and {len(status.scores) - _NUM_SCORES} more in metrics.json"


def _metric_rows(metrics: StepMetrics) -> Iterator[tuple[str, str]]:
    parts = f"{figure(metrics.loss)}"
    if metrics.balance_loss is not None:
        parts += f" (language {figure(metrics.language_loss)}, balance {figure(metrics.balance_loss)})"
    parts += f", gradient norm {figure(metrics.grad_norm)}, learning rate {figure(metrics.learning_rate)}"
    yield "loss", parts if metrics.epoch is None else f"{parts}, epoch {metrics.epoch:.2f}"
    if metrics.load_lowest is not None and metrics.load_highest is not None:
        load = f"least and most used: {metrics.load_lowest:.2f} and {metrics.load_highest:.2f} of an even share"
        dropped = metrics.dropped_share
        yield "experts", load if dropped is None else f"{load}, {100 * dropped:.1f} % dropped"


def _stage_name(progress: Progress) -> str:
    if progress.current is None:
        return "-"
    stage = progress.stages[progress.current]
    return f"{progress.current + 1}/{len(progress.stages)} {stage.name}"


def _bar(step: int, steps: int | None, name: str = "") -> RenderableType:
    row = Table.grid(padding=(0, 2))
    row.add_column(width=_BAR)
    row.add_column(no_wrap=True)
    share = f"  {100 * step / steps:.1f} %" if steps else ""
    text = f"{_of(step, steps)}{share}  {name}"
    row.add_row(ProgressBar(total=steps, completed=step, width=_BAR) if steps else "", Text(text.rstrip()))
    return row


def _of(step: int, steps: int | None) -> str:
    return f"{step:,}/{'?' if steps is None else f'{steps:,}'}"


def _speed(steps_per_second: float) -> str:
    if steps_per_second >= 1:
        return f"{steps_per_second:.2f} steps/s"
    return f"{1 / steps_per_second:.1f} s a step"


def _left(status: RunStatus) -> str:
    progress = status.progress
    parts = [f"{span(progress.stage_seconds)} for the stage"]
    if len(progress.stages) > 1:
        parts.append(
            "the run's later stages are not known"
            if progress.run_seconds is None
            else f"{span(progress.run_seconds)} for the run"
        )
    text = ", ".join(parts)
    if status.state == RUNNING and progress.run_seconds is not None:
        return f"{text}: until {clock(status.time + progress.run_seconds, now=status.time)}"
    return text if status.state == RUNNING else f"{text}, once it goes on"


def _attempts(status: RunStatus) -> Iterator[RenderableType]:
    shown = status.attempts[-_NUM_ATTEMPTS:]
    table = Table("attempt", "job", "nodes", "began", "lasted", "steps", "ended", box=None, pad_edge=False)
    for attempt in shown:
        until = status.time if attempt.ended is None else attempt.ended
        table.add_row(
            _number(attempt),
            Text(attempt.job or "-"),
            Text(names(attempt.nodes.split(","), 4) or "-"),
            clock(attempt.began, now=status.time),
            "-" if attempt.began is None else span(until - attempt.began),
            _gained(attempt),
            Text(attempt.outcome),
        )
    yield table
    if len(shown) < len(status.attempts):
        yield Text(f"({len(status.attempts) - len(shown)} earlier ones: --json)")
    for attempt in shown:
        if attempt.cause:
            yield _line(f"{attempt.outcome}, attempt {_number(attempt)}: {attempt.cause}")


def _number(attempt: Attempt) -> str:
    return "-" if attempt.number is None else str(attempt.number)


def _gained(attempt: Attempt) -> str:
    if attempt.first_step is None or attempt.last_step is None:
        return "-"
    lost = f", {attempt.lost_steps:,} lost" if attempt.lost_steps else ""
    return f"+{attempt.last_step - attempt.first_step:,}{lost}"
