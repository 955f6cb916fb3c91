"""The ranks of a check as a launcher would start them: processes of the real command, ended with the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "moe_lvlm", "preflight"]
TIME_LIMIT = 240.0  # seconds, for a loaded machine
# Names that resolve everywhere: a loopback address for each node.
NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


class Ranks:
    """Processes that meet on this machine, one on each "node"."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.port = _free_port()
        self._processes: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def start(
        self, check: str, *options: str, ranks: Sequence[int], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start some of the ranks."""
        for rank in ranks:
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(self.size),
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": NODES[0],
                "MASTER_PORT": str(self.port),
            }
            self._processes[rank] = subprocess.Popen(
                [*COMMAND, check, "--lines", "--nodes", ",".join(NODES[: self.size]), *options],
                cwd=ROOT,
                env={**os.environ, **place, **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

    def wait_for_word(self, key: str, text: str) -> None:
        """Until a rank has said something with this text in it: read in the ranks' own store."""
        store = TCPStore(NODES[0], self.port, is_master=False, timeout=timedelta(seconds=TIME_LIMIT))
        limit = time.monotonic() + TIME_LIMIT
        while text not in store.get(key).decode():
            assert time.monotonic() < limit, f"{key} never said {text}"
            time.sleep(0.05)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank and what it started."""
        os.killpg(self._processes[rank].pid, number)

    def finish(self, rank: int) -> tuple[int, str, str]:
        """Its exit status, stdout and stderr."""
        process = self._processes[rank]
        output, errors = process.communicate(timeout=TIME_LIMIT)
        return process.returncode, output, errors


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
