"""A folder in which a run trains lets no second one in, and is free as soon as the first one is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.training.lock import FolderInUseError, lock_folder
from tests.training.conftest import OVERRIDES
from tests.training.launching import Server, events, has_step
from tests.training.states import assert_same_checkpoint


def hold(folder: Path) -> tuple[int, int]:
    """A process that holds the lock, and the pipe that ends it; it has forked a child that outlives it."""
    ready, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock_folder(folder):
            if os.fork() == 0:
                signal.pause()
            os.write(held, b"x")
            signal.pause()
    os.read(ready, 1)
    return pid, os.getpgid(pid)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    pid, _ = hold(tmp_path / "run")
    with (
        pytest.raises(FolderInUseError, match=rf"run: another run trains here \(process {pid} on "),
        lock_folder(tmp_path / "run"),
    ):
        pytest.fail("let in")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        with lock_folder(tmp_path / "run") as problem:  # though its child still runs
            assert problem is None
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with lock_folder(tmp_path) as problem:
        assert problem is not None and "No locks available" in problem


@pytest.mark.distributed
def test_two_runs_in_one_folder(server: Server, recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    """The second is refused, whether it would go on or begin anew, and the first one does not notice."""
    run = tmp_path / "run"
    command = ["train", str(recipe), *OVERRIDES, f"output_dir={run}"]
    other = Server(tmp_path)
    try:
        first = other.start(command)
        first.wait_until(has_step(run, "tune", 1))
        first.signal(signal.SIGSTOP)
        for options in ([], ["--fresh"]):
            second = server.start([*command, *options])
            assert second.wait() == [2, 2]
            assert f"{run}: another run trains here (process {first.pids[0]} on " in second.output
        first.signal(signal.SIGCONT)
        assert first.wait() == [0, 0], first.output
    finally:
        other.close()
    assert events(run).steps() == events(unbroken).steps()
    assert_same_checkpoint(run / "checkpoints" / "sparse-000005", unbroken / "checkpoints" / "sparse-000005")
