"""Was anything lost, or done otherwise than in the unbroken run? Looks at a run's folder, from outside.

What is compared: every step's numbers in log.jsonl, exactly; every checkpoint's files by their checksums, those of
random generators left out (Python's own generator differs from process to process, torch's is compared at the end).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_lvlm.checkpoint.folder import global_step, read_latest
from moe_lvlm.checkpoint.layout import MANIFEST_FILE, read_json
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.verify import verify
from moe_lvlm.config.load import load_recipe

CHECKPOINTS, DONE, LOG = "checkpoints", "DONE", "log.jsonl"
_TIMED = {"time", "seconds", "data_seconds", "tokens_per_second"}
StepKey = tuple[str, int]


@dataclass(frozen=True)
class Problem:
    """kind: `lost`, a checkpoint that was reported saved is not there or not whole, or a run cannot go on; `wrong`, a
    resume from another place than the newest whole checkpoint, or a fault that was not met as it should be;
    `different`, numbers or weights that the unbroken run has otherwise."""

    kind: Literal["lost", "wrong", "different"]
    text: str


@dataclass(frozen=True)
class Found:
    """A checkpoint folder as it lies on the disk. problems: empty if it is whole."""

    name: str
    step: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Log:
    """log.jsonl. broken: numbers of lines that are no JSON objects; an unfinished last line is left out."""

    events: tuple[Mapping[str, Any], ...]
    broken: tuple[int, ...]

    def named(self, name: str, *, first: int = 0) -> list[Mapping[str, Any]]:
        """Events of one kind, from an event's number on."""
        return [event for event in self.events[first:] if event["event"] == name]

    def reported(self) -> list[str]:
        """Names of the checkpoints that were said to be saved, in order."""
        return [Path(event["path"]).name for event in self.named("checkpoint")]


@dataclass(frozen=True)
class Before:
    """What a start finds. places: names of the checkpoints that it may go on from; empty for a new run."""

    num_events: int = 0
    places: frozenset[str] = frozenset()


def read_log(folder: Path) -> Log:
    """The run's log so far."""
    path = folder / LOG
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    events, broken = [], []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            event = json.loads(line)
        except ValueError:
            broken.append(number)
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
        else:
            broken.append(number)
    return Log(tuple(events), tuple(broken))


def find_checkpoints(folder: Path) -> list[Found]:
    """All checkpoints on the disk, newest first; one that was set aside to be replaced counts, if it lost its place."""
    directory = folder / CHECKPOINTS
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        name = path.name
        if name.startswith(".") and name.endswith(".old") and not (directory / name[1 : -len(".old")]).exists():
            name = name[1 : -len(".old")]
        if path.is_dir() and not name.startswith("."):
            found.append(Found(name, global_step(path), tuple(verify(path))))
    return sorted(found, key=lambda one: (one.step, one.name), reverse=True)


def before_start(folder: Path) -> Before:
    """To be asked before each start.

    A resume must be from the newest whole checkpoint, or from the one that `latest` names if the newer ones were
    never reported: the run was killed between giving a checkpoint its name and saying so.
    """
    log = read_log(folder)
    whole = [one for one in find_checkpoints(folder) if not one.problems]
    places = {one.name for one in whole if one.step == whole[0].step}
    latest = read_latest(folder / CHECKPOINTS)
    named = next((one for one in whole if one.name == latest), None)
    if named is not None and not {one.name for one in whole if one.step > named.step} & set(log.reported()):
        places.add(named.name)
    return Before(len(log.events), frozenset(places))


class Judge:
    """Knows the unbroken run, which kept all its checkpoints."""

    def __init__(self, unbroken: Path, recipe: Path) -> None:
        """recipe: that of the runs to be judged."""
        settings = load_recipe(str(recipe))
        self._unbroken = unbroken
        self._keep_last = settings.train.checkpoint.keep_last
        self._keep_every = settings.train.checkpoint.keep_every
        log = read_log(unbroken)
        self._steps = {_place(event): _numbers(event) for event in log.named("step")}
        self.names = log.reported()
        self._ends = {_checkpoint_name(*max(places)) for places in self._places_by_stage().values()}
        self._files = {name: _files(unbroken / CHECKPOINTS / name) for name in self.names}

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    def judge(self, folder: Path, before: Before, *, spoiled: Collection[str] = ()) -> list[Problem]:
        """What is wrong with a run that is not running. before: what its last start found.

        spoiled: names of checkpoints that the torturer damaged, which nobody can expect to be whole.
        """
        log = read_log(folder)
        found = find_checkpoints(folder)
        problems = [Problem("different", f"{folder / LOG}: line {number} is no event") for number in log.broken]
        problems += self._lost(folder, log, found, spoiled)
        problems += self._resumed(log, before)
        problems += self._stepped(log)
        problems += self._saved(folder, found)
        if (folder / DONE).exists():
            problems += self._finished(folder, log)
        return problems

    def _lost(self, folder: Path, log: Log, found: list[Found], spoiled: Collection[str]) -> Iterator[Problem]:
        on_disk = {one.name: one for one in found}
        whole = [one for one in found if not one.problems]
        reported = [name for name in dict.fromkeys(log.reported()) if name not in spoiled]
        for name in reported:
            if name in on_disk:
                if on_disk[name].problems:
                    yield Problem("lost", f"{folder}: {name} was reported saved: {on_disk[name].problems[0]}")
            elif self._is_kept(name) or sum(one.step > self._step(name) for one in whole) < self._keep_last:
                yield Problem("lost", f"{folder}: {name} was reported saved and is not there, nor may it have gone")
        newest = max((self._step(name) for name in reported), default=0)
        if newest > max((one.step for one in whole), default=0):
            yield Problem("lost", f"{folder}: no whole checkpoint of step {newest} or later, though one was reported")

    def _resumed(self, log: Log, before: Before) -> Iterator[Problem]:
        resumes = log.named("resume", first=before.num_events)
        if not resumes and before.places and log.named("stage", first=before.num_events):
            yield Problem("wrong", f"began anew, though {sorted(before.places)} was there to go on from")
        for event in resumes:
            name = Path(event["path"]).name
            if name not in before.places:
                yield Problem("wrong", f"went on from {name}, should have from one of {sorted(before.places)}")
            elif event["global_step"] != self._step(name):
                yield Problem("wrong", f"went on from {name} as step {event['global_step']}, is {self._step(name)}")

    def _stepped(self, log: Log) -> Iterator[Problem]:
        for event in log.named("step"):
            expected = self._steps.get(_place(event))
            if _numbers(event) != expected:
                yield Problem("different", f"step {_place(event)}: {_difference(_numbers(event), expected or {})}")

    def _saved(self, folder: Path, found: list[Found]) -> Iterator[Problem]:
        for one in found:
            if not one.problems and one.name in self._files:
                path = folder / CHECKPOINTS / one.name
                # set aside while it was replaced: judged when it is back
                if path.exists() and (files := _files(path)) != self._files[one.name]:
                    yield Problem("different", f"{path}: {_difference(files, self._files[one.name])}")

    def _finished(self, folder: Path, log: Log) -> Iterator[Problem]:
        missing = self._steps.keys() - {_place(event) for event in log.named("step")}
        if missing:
            yield Problem("different", f"{folder}: done, but {LOG} has no step {min(missing)}")
        last = self.names[-1]
        path, expected = folder / CHECKPOINTS / last, self._unbroken / CHECKPOINTS / last
        if read_latest(folder / CHECKPOINTS) != last or not path.is_dir():
            yield Problem("lost", f"{folder}: done, but the last checkpoint is not {last}")
            return
        left = sorted(entry.name for entry in (folder / CHECKPOINTS).glob(".*"))
        if left:
            yield Problem("wrong", f"{folder}: done, but {left} was left half done")
        for rank in range(Checkpoint(expected).state["saved_world_size"]):
            ours, theirs = Checkpoint(path).rng(rank), Checkpoint(expected).rng(rank)
            if ours is None or theirs is None or not torch.equal(ours["torch.cpu"], theirs["torch.cpu"]):
                yield Problem("different", f"{path}: another state of torch's generator on rank {rank}")

    def _is_kept(self, name: str) -> bool:
        """Whether no retention may remove it."""
        step = int(name.rpartition("-")[2])
        return name in self._ends or bool(self._keep_every and step and step % self._keep_every == 0)

    def _step(self, name: str) -> int:
        """The global step of a checkpoint of that name."""
        stage, _, step = name.rpartition("-")
        return int(step) + sum(
            len(places) for other, places in self._places_by_stage().items() if self._order(other) < self._order(stage)
        )

    def _places_by_stage(self) -> dict[str, list[StepKey]]:
        found: dict[str, list[StepKey]] = {}
        for place in self._steps:
            found.setdefault(place[0], []).append(place)
        return found

    def _order(self, stage: str) -> int:
        return list(self._places_by_stage()).index(stage)


def _place(event: Mapping[str, Any]) -> StepKey:
    return event["stage"], event["step"]


def _numbers(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in _TIMED}


def _checkpoint_name(stage: str, step: int) -> str:
    return f"{stage}-{step:06d}"


def _files(path: Path) -> dict[str, Any]:
    """Size and checksum of each of a checkpoint's files, without the random generators."""
    records = read_json(path / MANIFEST_FILE)["files"]
    return {name: record for name, record in records.items() if not name.startswith("rng-")}


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            return f"{key} is {found.get(key)!r}, in the unbroken run {expected.get(key)!r}"
    return "the same"
