"""The state of a run, from the events of its jobs and the last words of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_lvlm.monitoring.attempts import ATTEMPT_EVENTS
from moe_lvlm.monitoring.records import moment, text
from moe_lvlm.monitoring.training_log import HANG, Segment

NEW = "not begun"
QUEUED = "queued"
RUNNING = "running"
SILENT = "silent"
STOPPED = "stopped"
REQUEUED = "requeued"
FAILED = "failed"
GAVE_UP = "gave up"
CANCELLED = "cancelled"
DONE = "done"
STATES = (NEW, QUEUED, RUNNING, SILENT, STOPPED, REQUEUED, FAILED, GAVE_UP, CANCELLED, DONE)
_ENDS = {"done": STOPPED, "stopped": STOPPED, "cancelled": CANCELLED}
_ENDED = (STOPPED, FAILED, GAVE_UP, CANCELLED)
_PART_DONE = "its part of the run is done"


@dataclass(frozen=True, slots=True)
class StateSince:
    """name: one of STATES. since: Unix seconds, None if nothing says. reason: what a job gave for it, or ""."""

    name: str
    since: float | None
    reason: str = ""


def job_state(events: Sequence[dict[str, Any]]) -> StateSince | None:
    """The state that events.jsonl leaves the run in; None if it tells of no job.

    After a job for some of the stages it is `queued` if jobs for the others wait, else `stopped`.
    """
    state: StateSince | None = None
    waiting: dict[str, float | None] = {}
    for event in events:
        name, time, job, reason = event["event"], moment(event.get("time")), text(event.get("job")), event.get("reason")
        if name == "submit":
            if state is not None and state.name in _ENDED and state.reason != _PART_DONE:
                waiting, state = {}, None  # a new beginning: what waited before waited for that job to end well
            waiting[job] = time
        elif name == "requeue":
            state = StateSince(REQUEUED, time)
        elif name == "give_up":
            state = StateSince(GAVE_UP, time, text(reason))
        elif name == "end":
            ended = _ENDS.get(text(reason), FAILED)
            ending = _PART_DONE if reason == "done" else text(event.get("detail")) or text(reason)
            state = StateSince(ended, time, "" if ending == ended else ending)
        elif name in ATTEMPT_EVENTS and (state is None or state.name != RUNNING or name == "start"):
            state = StateSince(RUNNING, time)
        if name != "submit":
            waiting = {one: at for one, at in waiting.items() if job != one and not job.startswith(f"{one}_")}
    if waiting and (state is None or state.reason == _PART_DONE):
        return StateSince(QUEUED, next(iter(waiting.values())))
    return state


def training_state(segment: Segment | None, *, is_locked: bool | None) -> StateSince:
    """The state of a run beside SLURM, by the newest start in log.jsonl."""
    if segment is None:
        return StateSince(RUNNING if is_locked else NEW, None)
    if segment.ending == HANG:
        return StateSince(FAILED, segment.last_heard, segment.hang)
    if segment.ending:
        return StateSince(STOPPED, segment.last_heard)
    if is_locked is False and segment.is_at_stage_end:
        return StateSince(STOPPED, segment.last_heard, "a stage is done")
    if is_locked is False:
        return StateSince(FAILED, segment.last_heard, "its processes ended without a word")
    return StateSince(RUNNING, segment.began)
