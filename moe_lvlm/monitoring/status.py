"""What can be said of a run from its files alone, at one moment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_lvlm.monitoring.attempts import LOST, Attempt, job_attempts, join_segments
from moe_lvlm.monitoring.attempts import RUNNING as IS_RUNNING
from moe_lvlm.monitoring.folder import BAD_SAMPLES, DONE, EVENTS, EXCLUDED, LOCK, LOG, RANK_LOGS, SLURM, the_run
from moe_lvlm.monitoring.hints import hints
from moe_lvlm.monitoring.liveness import is_locked
from moe_lvlm.monitoring.metrics import (
    CheckpointFacts,
    EvaluationScore,
    StepMetrics,
    newest_checkpoint,
    read_scores,
    step_metrics,
)
from moe_lvlm.monitoring.progress import Progress, measure_progress, read_recipe_facts
from moe_lvlm.monitoring.records import moment, read_events, text, whole_lines
from moe_lvlm.monitoring.state import DONE as IS_DONE
from moe_lvlm.monitoring.state import RUNNING, SILENT, StateSince, job_state, training_state
from moe_lvlm.monitoring.training_log import TrainingLog, read_training_log

# When a running run counts as silent: after so many of its times between logged steps and longest saves, and never
# sooner than the shortest. Before its first step it loads a model, for which the watchdog's own limit is given.
_PERIODS, _SAVES, _SHORTEST = 10, 3, 120.0
_BEFORE_FIRST_STEP = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run at one moment. Times are Unix seconds, spans are seconds.

    path: the run's folder. name: of its recipe. state: one of `state.STATES`, since when, and the reason a job gave.
    last_heard: when any file of the run last changed in a way that only a living run makes; silence_limit: after how
        long it counts as silent.
    attempts: all starts of training, the oldest first. restarts: their number less one.
    excluded: nodes that jobs of the run keep away from. skipped_steps: steps whose gradients were not finite.
    hints: what to do or to look at next. problems: what could not be read.
    """

    path: str
    name: str
    time: float
    state: str
    since: float | None
    reason: str
    last_heard: float | None
    silence_limit: float
    progress: Progress
    metrics: StepMetrics | None
    checkpoint: CheckpointFacts | None
    bad_samples: int
    skipped_steps: int
    scores: tuple[EvaluationScore, ...]
    attempts: tuple[Attempt, ...]
    restarts: int
    excluded: tuple[str, ...]
    hints: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As `moe-lvlm status --json` prints it (docs/monitoring.md)."""
        return asdict(self)


def read_status(run: Path, now: float | None = None) -> RunStatus:
    """Read a run's files. now: the moment that ages are counted to, Unix seconds; None is the present.

    Raises:
        ValueError: the folder is no run.
    """
    now = time.time() if now is None else now
    run = the_run(Path(run))
    is_done = (run / DONE).exists()
    log = read_training_log(run / LOG)
    events, unreadable = read_events(run / EVENTS)
    recipe = read_recipe_facts(run)
    attempts, state = _attempts_and_state(run, events, log, is_done=is_done)
    heard = _last_heard(run, events, log)
    limit = _silence_limit(log, recipe.hang_timeout)
    if state.name == RUNNING and heard is not None and now - heard > limit:
        state = StateSince(SILENT, heard)
    problems = [recipe.problem] if recipe.problem else []
    problems += [
        f"{run / name}: {count} lines could not be read"
        for name, count in ((EVENTS, unreadable), (LOG, log.unreadable))
        if count
    ]
    checkpoint = newest_checkpoint(run, now)
    return RunStatus(
        path=str(run),
        name=recipe.name or run.resolve().name,
        time=now,
        state=state.name,
        since=state.since,
        reason=state.reason,
        last_heard=heard,
        silence_limit=limit,
        progress=measure_progress(recipe.stages, log, is_done=is_done),
        metrics=None if log.last is None else step_metrics(log.last),
        checkpoint=checkpoint,
        bad_samples=sum(1 for _ in whole_lines(run / BAD_SAMPLES)),
        skipped_steps=log.skipped,
        scores=read_scores(run),
        attempts=tuple(attempts),
        restarts=max(len(attempts) - 1, 0),
        excluded=_excluded(run),
        hints=hints(run, state.name, attempts, events, checkpoint=None if checkpoint is None else checkpoint.name),
        problems=tuple(problems),
    )


def _attempts_and_state(
    run: Path, events: Sequence[dict[str, Any]], log: TrainingLog, *, is_done: bool
) -> tuple[list[Attempt], StateSince]:
    of_jobs = job_state(events)
    locked = is_locked(run)
    newest = log.segments[-1] if log.segments else None
    attempts = join_segments(job_attempts(events), log.segments, may_go_on=not is_done and locked is not False)
    is_beside_jobs = of_jobs is not None and bool(attempts) and attempts[-1].number is None
    if is_done:
        ended = newest.last_heard if newest is not None else None
        state = StateSince(IS_DONE, ended)
    elif of_jobs is None or (is_beside_jobs and of_jobs.name != RUNNING):
        state = training_state(newest, is_locked=locked)
    else:
        state = of_jobs
    if attempts and state.name != RUNNING and attempts[-1].outcome == IS_RUNNING:
        outcome = IS_DONE if is_done else LOST
        attempts[-1] = replace(attempts[-1], outcome=outcome, ended=attempts[-1].ended or state.since)
    return attempts, state


def _last_heard(run: Path, events: Sequence[dict[str, Any]], log: TrainingLog) -> float | None:
    """By the times in events, and the changes of the files that ranks and jobs print into."""
    times = [moment(event.get("time")) for event in events if event["event"] != "submit"]
    times += [segment.last_heard for segment in log.segments]
    for path in (run / LOCK, *(run / RANK_LOGS).glob("rank-*.log"), *(run / SLURM).glob("job-*.log")):
        if path.is_file():
            times.append(path.stat().st_mtime)
    return max((one for one in times if one is not None), default=None)


def _silence_limit(log: TrainingLog, hang_timeout: float | None) -> float:
    if not log.is_stepping or log.speed is None:
        return max(_BEFORE_FIRST_STEP, hang_timeout or 0.0)
    return max(_SHORTEST, _PERIODS * log.speed.logged_every + _SAVES * log.longest_save)


def _excluded(run: Path) -> tuple[str, ...]:
    """Nodes, one a line."""
    return tuple(node for line in whole_lines(run / EXCLUDED) if (node := text(line.decode("utf-8", "replace"))))
