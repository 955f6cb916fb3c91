"""The attempts of a run: what its SLURM jobs wrote into events.jsonl, beside what training wrote into log.jsonl."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_lvlm.monitoring.records import moment, text, whole
from moe_lvlm.monitoring.training_log import Segment

RUNNING = "running"
LOST = "lost"
CRASH = "crash"
STAGE_DONE = "stage done"
USER_ERROR = "user error"
ATTEMPT_EVENTS = ("start", "bad_node", "stop", "end")
# A job writes `start` on another node's clock than rank 0 its log.
_CLOCKS_APART = 5.0
_SRUN_TASK = re.compile(r"^[^ ]+: tasks? [\d,-]+: ")


@dataclass(frozen=True, slots=True)
class BadNode:
    """A node that a preflight found bad, and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of the run.

    number: over the life of the run's folder; None for a start beside SLURM in a folder of SLURM jobs. job: "17" or
        "17_3", "" without SLURM. nodes: names, as SLURM writes lists of them or with commas.
    began, ended: Unix seconds. Of an attempt that ended without a word `ended` is when it was last heard of.
    outcome: `running`, the reason of its `end` event (done, stopped, crash, hang, user error, preflight, cancelled), or
        `lost` if it ended without a word, `stage done` if it did so at the end of a stage. stop: why it was asked to stop ("time limit", ...), or "".
    status, rank, node, detail: of its end: exit status, and the rank that was the cause, where known. hang: what its
        watchdog said.
    first_step, last_step: steps of the run that it went on from and came to; None if training did not begin.
    lost_steps: steps of it that the next one had to repeat; None if there is no next one.
    """

    number: int | None
    job: str = ""
    nodes: str = ""
    began: float | None = None
    ended: float | None = None
    outcome: str = RUNNING
    stop: str = ""
    status: int | None = None
    rank: int | None = None
    node: str = ""
    detail: str = ""
    hang: str = ""
    bad_nodes: tuple[BadNode, ...] = ()
    first_step: int | None = None
    last_step: int | None = None
    lost_steps: int | None = None

    @property
    def cause(self) -> str:
        """Why it ended as it did, in a few words; "" if nothing is known."""
        bad = [f"{bad.node}: {bad.reason}" for bad in self.bad_nodes]
        told = "" if self.detail in [one.reason for one in self.bad_nodes] else self.detail
        if self.hang:
            told = self.hang  # srun's first rank is only the first that gave up waiting
        elif self.rank is not None:
            where = f"rank {self.rank}" + (f" on {self.node}" if self.node else "")
            told = f"{where}: {_SRUN_TASK.sub('', told)}" if told else where
        return "; ".join(part for part in (self.stop, told, *bad) if part)


def job_attempts(events: Sequence[dict[str, Any]]) -> list[Attempt]:
    """The attempts that events.jsonl tells of, in order of their numbers."""
    attempts: dict[int, Attempt] = {}
    for event in events:
        number = whole(event.get("attempt"))
        if event["event"] == "lost":
            _lose_first(attempts)
        elif event["event"] in ATTEMPT_EVENTS and number is not None:
            begun = Attempt(number=number, job=text(event.get("job")), began=moment(event.get("time")))
            attempts[number] = _after(attempts.get(number, begun), event)
    ordered = [attempts[number] for number in sorted(attempts)]
    return [_lost(attempt) for attempt in ordered[:-1]] + ordered[-1:]


def _after(attempt: Attempt, event: dict[str, Any]) -> Attempt:
    """The attempt, with one event more. Until it ends or is lost, `ended` is when it was last heard of."""
    time = moment(event.get("time")) or attempt.ended
    name, reason = event["event"], text(event.get("reason"))
    if name == "end":
        return replace(
            attempt,
            ended=time,
            outcome=reason or "ended",
            status=whole(event.get("status")),
            rank=whole(event.get("rank")),
            node=text(event.get("node")),
            detail=text(event.get("detail")),
        )
    attempt = replace(attempt, ended=time)
    if name == "start":
        return replace(attempt, nodes=text(event.get("nodes")))
    if name == "stop":
        return replace(attempt, stop=reason)
    return replace(attempt, bad_nodes=(*attempt.bad_nodes, BadNode(text(event.get("node")), reason)))


def _lost(attempt: Attempt) -> Attempt:
    return replace(attempt, outcome=LOST) if attempt.outcome == RUNNING else attempt


def _lose_first(attempts: dict[int, Attempt]) -> None:
    """The attempt before a `lost` event: the first that has not ended, since the one that tells may have begun."""
    running = sorted(number for number, attempt in attempts.items() if attempt.outcome == RUNNING)
    if running:
        attempts[running[0]] = _lost(attempts[running[0]])


def join_segments(attempts: Sequence[Attempt], segments: Sequence[Segment], *, may_go_on: bool) -> list[Attempt]:
    """All attempts by their beginning, with the steps that log.jsonl tells of; starts beside SLURM are attempts too.

    may_go_on: whether training may still run after the newest event of log.jsonl.
    """
    joined = list(attempts)
    for place, segment in enumerate(segments):
        owner = _owner(joined[: len(attempts)], segment)
        if owner is None:
            following = segments[place + 1 :]
            joined.append(_plain(segment, following[0] if following else None, may_go_on=may_go_on))
            owner = len(joined) - 1
        joined[owner] = _with_steps(joined[owner], segment, segments[place + 1] if segments[place + 1 :] else None)
    if not attempts:
        return [replace(attempt, number=number) for number, attempt in enumerate(joined, start=1)]
    joined = [replace(attempt, ended=None) if attempt.outcome == RUNNING else attempt for attempt in joined]
    return sorted(joined, key=lambda attempt: attempt.began or 0.0)


def _with_steps(attempt: Attempt, segment: Segment, following: Segment | None) -> Attempt:
    heard = [time for time in (attempt.ended, segment.last_heard) if time is not None]
    return replace(
        attempt,
        first_step=segment.first_step if attempt.first_step is None else attempt.first_step,
        last_step=segment.reached,
        hang=segment.hang or attempt.hang,
        nodes=attempt.nodes or ",".join(segment.hosts),
        lost_steps=None if following is None else max(segment.reached - following.first_step, 0),
        ended=max(heard, default=None) if attempt.outcome == LOST else attempt.ended,
    )


def _owner(attempts: Sequence[Attempt], segment: Segment) -> int | None:
    """The place of the attempt that wrote a segment: by its number, else by its time."""
    if segment.attempt is not None:
        return next((place for place, one in enumerate(attempts) if one.number == segment.attempt), None)
    if segment.began is None:
        return None
    begun = [place for place, one in enumerate(attempts) if (one.began or 0.0) <= segment.began + _CLOCKS_APART]
    if not begun:
        return None
    newest = attempts[begun[-1]]
    is_over = newest.outcome not in (RUNNING, LOST) and newest.ended is not None
    return None if is_over and segment.began > (newest.ended or 0.0) + _CLOCKS_APART else begun[-1]


def _plain(segment: Segment, following: Segment | None, *, may_go_on: bool) -> Attempt:
    if segment.ending:
        outcome = segment.ending
    elif following is None and may_go_on:
        outcome = RUNNING
    elif segment.is_at_stage_end and (following is None or following.first_step >= segment.reached):
        outcome = STAGE_DONE
    else:
        outcome = LOST
    return Attempt(
        number=None,
        job=segment.job,
        began=segment.began,
        ended=None if outcome == RUNNING else segment.last_heard,
        outcome=outcome,
    )
