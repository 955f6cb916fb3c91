"""Running a program that may hang, on a machine that may be broken."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """status: exit status, negative for a signal, None if it had to be killed. text: stdout and stderr as they came."""

    status: int | None
    text: str

    @property
    def last_line(self) -> str:
        """The last line that is not empty, "" if it said nothing."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def run_program(arguments: Sequence[str], *, limit: float) -> Answer:
    """Run it for at most `limit` seconds, then kill it and what it started.

    Raises:
        FileNotFoundError: there is no such program.
    """
    # A file, not a pipe: a grandchild that lives on would keep a pipe open, and us waiting.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)  # not waited for: stuck in the kernel, it would not die
        output.seek(0)
        return Answer(status, output.read().decode(errors="replace"))
