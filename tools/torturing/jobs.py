"""Runs under torture: started, watched, signalled, and gone when this program is."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torturing.strike import Strike

START_LIMIT = 300.0  # seconds for the imports, on a busy machine
PAUSE = 0.005
# A tiny run: one thread a rank, on the CPU, and nothing from the network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Job:
    """A started run. pids: its ranks, in order; they are one process group, numbered as the first."""

    def __init__(self, server: Server, pids: list[int], output: Path) -> None:
        self._server = server
        self.pids = pids
        self._output = output
        self.started = time.monotonic()

    @property
    def output(self) -> str:
        """What its ranks have said so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def statuses(self) -> list[int | None]:
        """Exit statuses; a signal's number is negative, None still runs."""
        return self._server.ask({"poll": self.pids})["statuses"]

    def signal(self, number: signal.Signals) -> None:
        """To all ranks that still run."""
        with suppress(ProcessLookupError):
            os.killpg(self.pids[0], number)

    def signal_one(self, rank: int, number: signal.Signals) -> None:
        if self.statuses()[rank] is None:
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def wait(self, condition: Callable[[], bool] = lambda: False, *, seconds: float) -> bool:
        """Wait until the condition holds, or all ranks have ended. Returns False if neither came in time."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if condition() or all(status is not None for status in self.statuses()):
                return True
            time.sleep(PAUSE)
        return False

    def kill(self) -> None:
        """SIGKILL to all ranks, and wait for their end."""
        self.signal(signal.SIGKILL)
        self.wait(seconds=START_LIMIT)


class Server:
    """The process that forks ranks (see `server`). To be used as a context, at whose end all is killed."""

    def __init__(self, folder: Path) -> None:
        """folder: for the output of runs."""
        self._folder = folder
        self._count = 0
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._process = subprocess.Popen(
            # the folder only tells whoever lists processes whose ranks they are
            [sys.executable, "-m", "torturing.server", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for this program, which ends the ranks
        )

    def __enter__(self) -> Server:
        try:
            self._read(START_LIMIT)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, command: Sequence[str], *, world: int, strike: Strike | None = None) -> Job:
        """Start `moe-lvlm` with this command line on so many ranks."""
        output = self._folder / f"output-{self._count:04d}.txt"
        output.touch()
        self._count += 1
        wanted = {
            "command": [*command],
            "world": world,
            "output": str(output),
            "strike": None if strike is None else strike.to_json(),
        }
        return Job(self, self.ask({"start": wanted})["pids"], output)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._read(START_LIMIT)

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"the process that forks ranks said nothing for {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks ranks has ended; what it said is above")
        values: dict[str, Any] = json.loads(line)
        return values

    def close(self) -> None:
        """End all ranks and the process that forked them."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # at which it kills the ranks that still run
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
