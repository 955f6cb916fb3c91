"""Runs as tests start them: processes from the server, with a time limit, killed as a group."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 300.0  # for a loaded machine; a run takes seconds


class Job:
    """A started run. pids: its processes, the first one's being the process group's id."""

    def __init__(self, server: Server, pids: list[int], output: Path) -> None:
        self._server = server
        self.pids = pids
        self._output = output
        self.statuses: list[int] | None = None

    @property
    def output(self) -> str:
        """What its processes have said so far, stdout and stderr."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.pids[0], number)

    def wait(self) -> list[int]:
        """Exit statuses of its processes, a signal's number being negative. Past the time limit they are killed."""
        if self.statuses is None:
            try:
                self.statuses = self._server.reply()["statuses"]
            except TimeoutError:
                self.signal(signal.SIGKILL)
                self.statuses = self._server.reply()["statuses"]
                raise TimeoutError(f"killed after {TIME_LIMIT} s:\n{self.output}") from None
        assert self.statuses is not None
        return self.statuses

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the run does."""
        limit = time.monotonic() + TIME_LIMIT
        while not condition():
            if self._server.has_reply() or time.monotonic() > limit:
                if not self._server.has_reply():
                    self.signal(signal.SIGKILL)
                raise AssertionError(f"ended too early, or never got there: {self.wait()}\n{self.output}")
            time.sleep(0.002)


class Server:
    """The process that forks runs; one run at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.server"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def start(self, command: Sequence[str], *, world: int = 2, **environment: str) -> Job:
        """Start a run: a command of `moe-lvlm`, or a function of `tests.training.children`."""
        output = self._folder / f"output-{self._started}.txt"
        output.touch()
        self._started += 1
        request = {"command": [*command], "world": world, "environment": environment, "output": str(output)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return Job(self, self.reply()["pids"], output)

    def run(self, command: Sequence[str], *, world: int = 2) -> Job:
        """Start a run and wait for its end, which must be a good one."""
        job = self.start(command, world=world)
        assert not any(job.wait()), job.output
        return job

    def has_reply(self, seconds: float = 0.0) -> bool:
        """Whether the server has said something, or does so soon."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], seconds)[0])

    def reply(self) -> dict[str, Any]:
        """The server's next line."""
        assert self._process.stdout is not None
        if not self.has_reply(TIME_LIMIT):
            raise TimeoutError
        line = self._process.stdout.readline()
        assert line, "the server of the training tests has ended"
        values: dict[str, Any] = json.loads(line)
        return values

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Events:
    """A run's log.jsonl."""

    lines: list[dict[str, Any]]

    def named(self, name: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [line for line in self.lines if line["event"] == name]

    def steps(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The steps without what is timed, by stage and number; one that was done twice was done alike."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for line in self.named("step"):
            values = {key: line[key] for key in line.keys() - {"time", "seconds", "data_seconds", "tokens_per_second"}}
            assert found.setdefault((line["stage"], line["step"]), values) == values
        return found

    def losses(self) -> list[float]:
        """The loss of every step, in order."""
        return [values["loss"] for values in sorted(self.steps().values(), key=lambda values: values["global_step"])]


def events(run: Path) -> Events:
    """What a run has logged so far; a line that is just being written is left out."""
    path = run / "log.jsonl"
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    return Events([json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()])


def has_step(run: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether a step has been logged."""
    return lambda: any((line["stage"], line["step"]) == (stage, step) for line in events(run).named("step"))


def processes_with(argument: str) -> list[int]:
    """Processes with that text on their command line; torchrun gives each of its own a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if argument.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it has ended
                continue
    return found


def living(pids: Sequence[int]) -> Iterator[int]:
    """Those processes that still run."""
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        yield pid


def assert_no_orphans(job: Job) -> None:
    """Nothing of its process group is left; data workers leave a moment after their trainer."""
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        try:
            os.killpg(job.pids[0], 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    job.signal(signal.SIGKILL)
    raise AssertionError("processes of the run are left")


def kill_after(server: Server, command: Sequence[str], run: Path, stage: str, step: int) -> None:
    """Start a run, and kill all its processes when it has logged this step."""
    job = server.start(command)
    job.wait_until(has_step(run, stage, step))
    job.signal(signal.SIGKILL)
    assert set(job.wait()) == {-signal.SIGKILL}
