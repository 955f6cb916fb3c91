"""Launchers as users start them: their processes, what they say, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.training.launching import ROOT, TIME_LIMIT, has_step, processes_with

# What a launcher of the tests' own process must not hand on.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launch:
    """A launcher that was started, in a session of its own, as in a terminal."""

    def __init__(self, line: Sequence[str], output: Path, **environment: str) -> None:
        self._output = output
        inherited = {key: value for key, value in os.environ.items() if key not in _RANKS}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                ["bash", *line],
                cwd=ROOT,
                env=inherited | {"HF_HUB_OFFLINE": "1"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def wait_for_step(self, run: Path, stage: str, step: int) -> None:
        """Wait until the run has logged this step."""
        self._wait_for(has_step(run, stage, step))

    def wait_for_words(self, words: str) -> None:
        """Wait until it has said them."""
        self._wait_for(lambda: words in self.output)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + TIME_LIMIT
        while not condition():
            assert self.process.poll() is None and time.monotonic() < limit, self.output
            time.sleep(0.01)

    def wait(self) -> int:
        """Its exit status."""
        try:
            return self.process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end:\n{self.output}") from None

    def press_ctrl_c(self) -> None:
        """What a terminal does: a signal to the foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)


@contextmanager
def launched(script: str, arguments: Sequence[str], output: Path, **environment: str) -> Iterator[Launch]:
    """A launcher of launch/; what it has left of processes that name the output's folder is killed at the end."""
    launch = Launch([f"launch/{script}", *arguments], output, **environment)
    try:
        yield launch
    finally:
        if launch.process.poll() is None:
            launch.process.kill()
            launch.process.wait()
        for pid in processes_with(str(output.parent)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    ids: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        ids += map(int, task.read_text().split())
    return ids


def assert_none_left(argument: str) -> None:
    """No process with that text is left, or soon none is."""
    limit = time.monotonic() + 60
    while processes_with(argument):
        assert time.monotonic() < limit, f"left: {processes_with(argument)}"
        time.sleep(0.1)
