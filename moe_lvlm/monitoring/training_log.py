"""log.jsonl, read in one pass: the starts of training that wrote it, the stage and step it has come to, its speed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from moe_lvlm.monitoring.records import moment, number, parse_record, text, whole, whole_lines

WINDOW = 20
"""Logged steps that a speed is taken over."""
STOPPED, DONE, HANG = "stopped", "done", "hang"
_ENDINGS = (STOPPED, DONE, HANG)
# How training writes a step. Such lines can be long and many: they are only parsed if their numbers are needed.
_STEP = b'{"event": "step",'


@dataclass(slots=True)
class Segment:
    """What one start of the training processes wrote.

    began, last_heard: times of its first and last event. first_step: the run's step that it went on from. last_step: the
    last one it logged. ending: `stopped`, `done` or `hang` as it said itself, else "". hang: what it said of that.
    has_stage: whether a stage was made ready. is_at_stage_end: whether it came to its stage's last step, where training
    with --until ends. attempt, job: of a SLURM job. hosts: that it trains on.
    """

    began: float | None = None
    last_heard: float | None = None
    first_step: int = 0
    last_step: int | None = None
    ending: str = ""
    hang: str = ""
    is_at_stage_end: bool = False
    has_stage: bool = False
    attempt: int | None = None
    job: str = ""
    hosts: tuple[str, ...] = ()

    @property
    def reached(self) -> int:
        """The run's step that it came to."""
        return self.first_step if self.last_step is None else self.last_step


@dataclass(slots=True)
class LoggedStage:
    """A stage as its event has it: place among the stages, steps in all (None: not said), samples a step."""

    name: str
    index: int
    steps: int | None
    global_batch: int | None


@dataclass(frozen=True, slots=True)
class Speed:
    """Over the last logged steps of the stage, without the time between attempts.

    logged_every: seconds between logged steps, their median.
    """

    steps_per_second: float
    tokens_per_second: float | None
    logged_every: float


@dataclass(slots=True)
class TrainingLog:
    """Where log.jsonl says that training stands. stage, step: the current stage and the steps done in it; global_step:
    those of the run. last: the last logged step. is_stepping: whether the newest start has logged a step of this stage. skipped: different steps whose gradients were not finite."""

    segments: list[Segment] = field(default_factory=list)
    stages: dict[str, LoggedStage] = field(default_factory=dict)
    stage: LoggedStage | None = None
    step: int = 0
    global_step: int = 0
    last: dict[str, Any] | None = None
    speed: Speed | None = None
    is_stepping: bool = False
    skipped: int = 0
    longest_save: float = 0.0
    unreadable: int = 0


def read_training_log(path: Path) -> TrainingLog:
    """Read the file; without one everything is empty. Lines that cannot be read are counted and passed over."""
    reader = _Reader()
    for line in whole_lines(path):
        reader.take(line)
    return reader.finish()


class _Reader:
    """Takes the lines of log.jsonl in order."""

    def __init__(self) -> None:
        self._log = TrainingLog()
        self._skipped: set[tuple[str, int]] = set()
        self._has_resumed = False  # in the newest segment
        self._stage_step = 0  # the current stage's step at which the segment took it up
        self._recent: deque[bytes] = deque(maxlen=WINDOW + 1)  # steps of the current stage and segment
        self._before: tuple[int, deque[bytes]] = (0, deque())  # the same of the segment before, in the same stage
        self._is_step_open = False  # whether the newest of `recent` was not looked into yet

    def take(self, line: bytes) -> None:
        """Add one line."""
        record = None if line.startswith(_STEP) else parse_record(line)
        if line.startswith(_STEP) or (record and record.get("event") == "step"):
            self._recent.append(line)
            self._is_step_open = True
        elif record is None or not isinstance(record.get("event"), str):
            self._log.unreadable += bool(line.strip())
        else:
            self._close_steps()
            self._take_event(record["event"], record)

    def finish(self) -> TrainingLog:
        """What was read."""
        self._close_steps()
        self._mark_idle()
        self._log.skipped = len(self._skipped)
        self._log.is_stepping = bool(self._recent)
        self._log.speed = _speed(self._stage_step, self._recent) or _speed(*self._before)
        return self._log

    def _close_steps(self) -> None:
        """Take the numbers of the last logged step, before another event."""
        if not self._is_step_open:
            return
        self._is_step_open = False
        record = next(_readable(reversed(self._recent)), None)
        if record is None:
            self._log.unreadable += 1
            return
        log = self._log
        log.last = record
        log.step = whole(record.get("step")) or log.step
        log.global_step = whole(record.get("global_step")) or log.global_step
        segment = self._segment(record)
        segment.last_step = log.global_step
        segment.is_at_stage_end = log.stage is not None and log.stage.steps == log.step
        segment.last_heard = moment(record.get("time")) or segment.last_heard

    def _take_event(self, name: str, record: dict[str, Any]) -> None:
        if self._is_beginning(name, record):
            self._begin(record)
        segment = self._segment(record)
        segment.last_heard = moment(record.get("time")) or segment.last_heard
        if name == "world":
            segment.attempt = whole(record.get("attempt"))
            segment.job = text(record.get("job"))
            hosts = record.get("hosts")
            segment.hosts = tuple(dict.fromkeys(map(text, hosts))) if isinstance(hosts, list) else ()
        elif name == "resume":
            self._has_resumed = True
            segment.first_step = self._log.global_step = whole(record.get("global_step")) or 0
        elif name == "stage":
            self._take_stage(segment, record)
        elif name == "skipped":
            stage = self._log.stage.name if self._log.stage else ""
            self._skipped.add((stage, whole(record.get("step")) or 0))
        elif name == "checkpoint":
            self._log.longest_save = max(self._log.longest_save, number(record.get("seconds")) or 0.0)
        elif name in _ENDINGS:
            segment.ending = name
            segment.hang = _hang_in_words(record) if name == HANG else ""

    def _is_beginning(self, name: str, record: dict[str, Any]) -> bool:
        """Whether a new start of training writes this. Older versions wrote no `world`: nothing before `resume`, or
        before the first stage's own event if there was no checkpoint yet."""
        has_stage = bool(self._log.segments) and self._log.segments[-1].has_stage
        if name == "resume":
            return self._has_resumed or has_stage
        is_first_step = name == "stage" and not whole(record.get("index")) and not whole(record.get("step"))
        return name == "world" or (is_first_step and has_stage)

    def _begin(self, record: dict[str, Any]) -> None:
        self._has_resumed = False
        self._shelve()
        self._log.segments.append(Segment(began=moment(record.get("time")), first_step=self._log.global_step))

    def _mark_idle(self) -> None:
        """Starts of a run that was done already found nothing to do."""
        is_done = False
        for segment in self._log.segments:
            if is_done and not segment.has_stage:
                segment.ending = DONE
            is_done = is_done or segment.ending == DONE

    def _shelve(self) -> None:
        if self._recent:
            self._before = self._stage_step, self._recent
            self._recent = deque(maxlen=WINDOW + 1)

    def _segment(self, record: dict[str, Any]) -> Segment:
        if not self._log.segments:
            self._begin(record)
        return self._log.segments[-1]

    def _take_stage(self, segment: Segment, record: dict[str, Any]) -> None:
        log = self._log
        if not self._has_resumed and not segment.has_stage:
            segment.first_step = log.global_step = 0
        name = text(record.get("stage"))
        is_same = log.stage is not None and log.stage.name == name
        self._shelve()
        if not is_same:
            self._before = 0, deque()
        segment.has_stage = True
        segment.is_at_stage_end = False
        self._stage_step = log.step = whole(record.get("step")) or 0
        log.stage = LoggedStage(
            name=name,
            index=whole(record.get("index")) or 0,
            steps=whole(record.get("steps")),
            global_batch=whole(record.get("global_batch")),
        )
        log.stages[name] = log.stage


def _hang_in_words(record: dict[str, Any]) -> str:
    """Of a `hang` event, which the watchdog writes."""
    place = f"phase {text(record.get('phase')) or '?'}"
    if stage := text(record.get("stage")):
        place += f" after step {text(record.get('step'))} of {stage}"
    silent = record.get("silent")
    ranks = ", ".join(map(text, silent)) if isinstance(silent, list) else ""
    return f"no progress in {place}" + (f"; silent: rank {ranks}" if ranks else "")


def _readable(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    return (record for line in lines if (record := parse_record(line)) is not None)


def _speed(first: int, lines: deque[bytes]) -> Speed | None:
    """first: the stage's step that the segment took up the stage at; its own first step is left out where there are
    more, since it warms up."""
    steps = list(_readable(lines))
    if len(steps) == 1:
        steps = [{"step": first}, *steps]
    pairs = [(_advance(one, other), other) for one, other in pairwise(steps)]
    timed = [
        (advance, seconds, number(record.get("tokens")))
        for advance, record in pairs
        if advance > 0 and (seconds := number(record.get("seconds"))) is not None and seconds > 0
    ]
    if not timed:
        return None
    seconds = sum(one for _, one, _ in timed)
    tokens = [one for _, _, one in timed if one is not None]
    return Speed(
        steps_per_second=sum(one for one, _, _ in timed) / seconds,
        tokens_per_second=sum(tokens) / seconds if len(tokens) == len(timed) else None,
        logged_every=median(one for _, one, _ in timed),
    )


def _advance(one: dict[str, Any], other: dict[str, Any]) -> int:
    return (whole(other.get("step")) or 0) - (whole(one.get("step")) or 0)
