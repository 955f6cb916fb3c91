"""Commands of `moe-lvlm` as processes of their own, several at a time, that save and end when they are asked to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from reproducing.runs import RunFailedError, StoppedError

ROOT = Path(__file__).resolve().parents[2]
_TICK = 0.2  # seconds between looks; a signal's handler runs between them
# Waiting threads that spin take the cores from the processes that compute.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


class Launcher:
    """Starts commands. gpus_by_slot: the GPUs of each job that runs at a time; empty where all compute on the CPU."""

    def __init__(self, gpus_by_slot: Sequence[Sequence[str]] = ()) -> None:
        self._gpus_by_slot = gpus_by_slot
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.is_stopping = False

    def call(self, arguments: Sequence[str], processes: int, log: Path, *, slot: int) -> int:
        """Run a command to its end, its output added to a log; the exit status.

        Raises:
            StoppedError: everything was asked to stop before it began.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        command = launch_command(arguments, processes)
        with log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            with self._lock:
                if self.is_stopping:
                    raise StoppedError("not begun")
                # a session of its own: Ctrl-C comes to us, and we tell it
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self._environment(slot),
                    start_new_session=True,
                )
                self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Start nothing more, and signal what runs: training saves after its step; SIGKILL ends it at once."""
        with self._lock:
            self.is_stopping = True
            for process in self._running:
                with suppress(ProcessLookupError):
                    if number == signal.SIGKILL:
                        os.killpg(process.pid, number)
                    else:
                        process.send_signal(number)

    def _environment(self, slot: int) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = _ENVIRONMENT | os.environ | {"PYTHONPATH": path}
        if not self._gpus_by_slot:
            return environment | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus_by_slot[slot])}


def launch_command(arguments: Sequence[str], processes: int) -> list[str]:
    """`moe-lvlm` with these arguments, through torchrun where there is more than one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    several = [*launcher, "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *several, "-m", "moe_lvlm", *arguments]


@dataclass(eq=False)
class Job:
    """Something to do once what it comes after is done. work: called with the number of a free slot."""

    name: str
    work: Callable[[int], None]
    after: Job | None = None
    state: str = "waiting"  # running, done, failed, stopped
    problem: str | None = field(default=None, repr=False)


def run_jobs(jobs: Sequence[Job], *, slots: int, launcher: Launcher, on_change: Callable[[], None]) -> None:
    """Do jobs in their order, as many at a time as there are slots; each one's state tells how it ended.

    One that fails does not keep others from running, but for those after it. KeyboardInterrupt (Ctrl-C, or SIGTERM
    where its handler raises that) asks all to save and end, and comes out when they have; a second one kills them.
    """
    changed = threading.Condition()
    threads = [
        threading.Thread(target=_work, args=(slot, jobs, changed, launcher), name=f"slot-{slot}", daemon=True)
        for slot in range(slots)
    ]
    for thread in threads:
        thread.start()
    try:
        _watch(threads, on_change)
    except KeyboardInterrupt:
        launcher.stop()
        try:
            _watch(threads, on_change)
        except KeyboardInterrupt:
            launcher.stop(signal.SIGKILL)
            _watch(threads, on_change)
        raise


def _watch(threads: Sequence[threading.Thread], on_change: Callable[[], None]) -> None:
    for thread in threads:
        while thread.is_alive():
            thread.join(_TICK)
            on_change()
    on_change()


def _work(slot: int, jobs: Sequence[Job], changed: threading.Condition, launcher: Launcher) -> None:
    """One slot: take the first job that may begin, until none is left."""
    while True:
        with changed:
            job = _next(jobs, changed, launcher)
            if job is None:
                return
            job.state = "running"
        try:
            job.work(slot)
        except StoppedError:
            outcome, problem = "stopped", None
        except (RunFailedError, ValueError, OSError) as error:
            # a command that was told to end has not failed
            outcome, problem = ("stopped", None) if launcher.is_stopping else ("failed", str(error))
        except Exception:  # ours; it must not leave those that wait for this job waiting
            outcome, problem = "failed", f"{job.name}: {traceback.format_exc()}"
        else:
            outcome, problem = "done", None
        with changed:
            job.state, job.problem = outcome, problem
            changed.notify_all()


def _next(jobs: Sequence[Job], changed: threading.Condition, launcher: Launcher) -> Job | None:
    """The first job whose predecessor is done; None when no job is left that ever could begin."""
    while not launcher.is_stopping:
        waiting = [job for job in jobs if job.state == "waiting"]
        for job in waiting:
            if job.after is None or job.after.state == "done":
                return job
            if job.after.state in ("failed", "stopped"):
                job.state = job.after.state
                job.problem = f"{job.name}: not begun, since {job.after.name} {job.after.state}"
        if not any(job.state == "waiting" for job in jobs):
            return None
        changed.wait(_TICK)
    return None
