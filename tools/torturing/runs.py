"""The unbroken run, and runs that faults happen to."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torturing.inputs import Topology, write_inputs
from torturing.jobs import Job, Server
from torturing.judge import CHECKPOINTS, DONE, Before, Judge, Problem, before_start, find_checkpoints, read_log
from torturing.strike import Strike

TIME_LIMIT = 300.0  # seconds in which a job ends, on a busy machine; it takes a few


@dataclass(frozen=True)
class Bench:
    """All that faults need. folder: where runs lie. seconds: that the unbroken run took.

    changes: of the run's folder that each rank made in the unbroken run (see `Strike`).
    """

    server: Server
    folder: Path
    topology: Topology
    recipe: Path
    judge: Judge
    rng: random.Random
    seconds: float
    changes: tuple[int, ...]
    is_kept: bool = False

    def victim(self, name: str, *, inside: Path | None = None) -> Victim:
        """A run that has not begun. inside: the folder that its own is made in."""
        return Victim(self, (inside or self.folder) / name)


def set_up(server: Server, folder: Path, topology: Topology, *, seed: int, is_kept: bool) -> Bench:
    """Write the inputs and make the unbroken run.

    Raises:
        ValueError: a topology that cannot train; the message is the trainer's.
    """
    recipe = write_inputs(folder / "inputs", topology)
    unbroken = folder / "unbroken"
    keep_all = ("train.checkpoint.keep_last=1000", f"output_dir={unbroken}")
    notes = folder / "changes"
    count = Strike(kind="count", rank=None, folder=f"{unbroken}/", notes=str(notes))
    job = server.start(["train", str(recipe), *keep_all], world=topology.world, strike=count)
    is_over = job.wait(seconds=TIME_LIMIT)
    seconds = time.monotonic() - job.started
    if not is_over or any(job.statuses()):
        job.kill()
        raise ValueError(f"the unbroken run failed:\n{job.output}")
    changes = tuple(int(Path(f"{notes}-{rank}").read_text()) for rank in range(topology.world))
    return Bench(
        server=server,
        folder=folder,
        topology=topology,
        recipe=recipe,
        judge=Judge(unbroken, recipe),
        rng=random.Random(seed),
        seconds=seconds,
        changes=changes,
        is_kept=is_kept,
    )


@dataclass
class Victim:
    """A run's folder. `start` and `settle` alternate; `problems` gathers what the judge says after each."""

    bench: Bench
    folder: Path
    problems: list[Problem] = field(default_factory=list)
    known: set[Problem] = field(default_factory=set)
    spoiled: set[str] = field(default_factory=set)
    before: Before = field(default_factory=Before)
    num_starts: int = 0

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE).exists()

    @property
    def command(self) -> list[str]:
        """The same at every start."""
        return ["train", str(self.bench.recipe), f"output_dir={self.folder}"]

    def start(self, strike: Strike | None = None) -> Job:
        self.before = before_start(self.folder)
        self.num_starts += 1
        return self.bench.server.start(self.command, world=self.bench.topology.world, strike=strike)

    def settle(self, job: Job) -> None:
        """Wait until the job has ended, and judge. A job that does not end is killed, which is a problem too."""
        if not job.wait(seconds=TIME_LIMIT):
            job.kill()
            self.complain("wrong", f"hung for {TIME_LIMIT:.0f} s:\n{job.output[-2000:]}")
        self.problems += self.bench.judge.judge(self.folder, self.before, spoiled=self.spoiled)
        if self.spoiled:  # what was saved again is as good as any
            self.spoiled -= {one.name for one in find_checkpoints(self.folder) if not one.problems}

    def finish(self) -> Job:
        """Start once more and let it train to its end."""
        job = self.start()
        self.settle(job)
        if any(job.statuses()) or not self.is_done:
            self.complain("lost", f"the same command does not go on:\n{job.output[-2000:]}")
        return job

    def reach(self, job: Job, condition: Callable[[], bool]) -> bool:
        """Wait for something that the job does; whether it did it."""
        job.wait(condition, seconds=TIME_LIMIT)
        return condition()

    def num_reported(self) -> int:
        """Checkpoints that were said to be saved, in all starts."""
        return len(read_log(self.folder).reported())

    def has_stepped(self) -> bool:
        """Whether the last start has logged a step."""
        return bool(read_log(self.folder).named("step", first=self.before.num_events))

    def complain(self, kind: str, text: str) -> None:
        self.problems.append(Problem(kind, f"{self.folder}: {text}"))  # type: ignore[arg-type]

    def take_problems(self) -> list[Problem]:
        """Those that were found since the last time; one that stays is told once."""
        new = [problem for problem in dict.fromkeys(self.problems) if problem not in self.known]
        self.known.update(new)
        self.problems = []
        return new

    def discard(self) -> None:
        """Remove the folder, unless something is wrong with it or all are to be kept."""
        if not self.problems and not self.known and not self.bench.is_kept:
            shutil.rmtree(self.folder, ignore_errors=True)
