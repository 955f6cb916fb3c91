"""Starts groups of processes for tests: a server that has imported everything once, and forks the ranks of each job.

A start of Python with torch, transformers and DeepSpeed takes seconds of computation, a fork milliseconds; and each job
has processes, process groups and DeepSpeed's own state for itself.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# What jobs import anyway, before the first fork: the package, and what torch.optim would import late.
_PRELOAD = (
    "moe_lvlm.training.run",
    "moe_lvlm.cli",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llava.modeling_llava",
    "tests.parallel.jobs",
)
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GRACE = 5.0  # seconds that ranks have to end by themselves after one of them failed


@dataclass(frozen=True)
class Job:
    """A function (importable by name) that each of `world` ranks calls; its result is saved by rank in `folder`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    world: int
    folder: Path
    timeout: float


class RanksFailedError(AssertionError):
    """A rank raised, died, or was killed when the time was over. The message holds each rank's output."""


class RankServer:
    """The server's other end, in the process of the tests. A context manager: leaving it ends all that it started."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.parallel.rank_server import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            start_new_session=True,
        )

    def __enter__(self) -> RankServer:
        return self

    def __exit__(self, *exception: object) -> None:
        # the whole session that we started: the server and whatever ranks it still has
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def run(
        self, function: Callable[..., Any], *arguments: Any, world: int, folder: Path, timeout: float = 150
    ) -> list[Any]:
        """What the function returned on each rank.

        Raises:
            RanksFailedError: with the end of each rank's output.
        """
        folder.mkdir(parents=True, exist_ok=True)
        assert self._server.stdin is not None and self._server.stdout is not None
        pickle.dump(Job(function, arguments, world, folder, timeout), self._server.stdin)
        self._server.stdin.flush()
        codes = pickle.load(self._server.stdout)
        if any(codes):
            raise RanksFailedError(_describe(codes, folder, timeout))
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]


def _describe(codes: list[int], folder: Path, timeout: float) -> str:
    parts = [f"ranks ended with {codes} (limit {timeout:.0f} s)"]
    for rank in range(len(codes)):
        text = (folder / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace")
        parts.append(f"---- rank {rank}:\n{text[-4000:]}")
    return "\n".join(parts)


def serve() -> None:
    """The server's loop: a job from stdin, its ranks, their exit codes to stdout; ends with the input."""
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the replies
    torch.set_num_threads(1)
    for module in _PRELOAD:
        importlib.import_module(module)
    # DeepSpeed's probe of what can be compiled here, which joining a world asks for: once, not in each rank
    assert importlib.import_module("deepspeed.ops").__compatible_ops__
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        pickle.dump(_run(job), replies)
        replies.flush()


def _run(job: Job) -> list[int]:
    """Exit codes of all ranks; when one fails or the time is over, the others are asked for their stacks and killed."""
    port = _free_port()
    running = {_fork(job, rank, port): rank for rank in range(job.world)}
    codes = [0] * job.world
    deadline, is_ending = time.monotonic() + job.timeout, False
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank]:
                deadline = min(deadline, time.monotonic() + _GRACE)
            continue
        if time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL if is_ending else signal.SIGUSR1)
            deadline, is_ending = time.monotonic() + 1, True
        time.sleep(0.01)
    return codes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(job: Job, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(job.folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        values = (rank, rank, job.world, "127.0.0.1", port)
        os.environ.update({key: str(value) for key, value in zip(_LAUNCHER, values, strict=True)})
        torch.save(job.function(*job.arguments), job.folder / f"rank-{rank}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
