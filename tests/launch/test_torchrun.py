"""launch/torchrun.sh: several nodes, signals, and exit statuses."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launch.conftest import OVERRIDES
from tests.launch.launches import assert_none_left, children, launched
from tests.launch.nodes import free_port
from tests.launch.runs import assert_stopped
from tests.training.launching import events

pytestmark = pytest.mark.distributed


def test_two_nodes(recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    """Two launchers with a process each. One is told to end: both nodes save, and both end well."""
    run = tmp_path / "run"
    port = free_port()

    def arguments(rank: int) -> list[str]:
        nodes = ["--nnodes", "2", f"--node-rank={rank}", "--master", f"localhost:{port}", "--rdzv-id", "tiny"]
        return [*nodes, "--nproc", "1", str(recipe), *OVERRIDES, f"output_dir={run}", "--stop-signal", "USR1"]

    with (
        launched("torchrun.sh", arguments(1), tmp_path / "node1.txt") as second,
        launched("torchrun.sh", arguments(0), tmp_path / "node0.txt") as first,
    ):
        second.wait_for_step(run, "sparse", 1)
        second.process.send_signal(signal.SIGUSR1)
        assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
        assert "SIGUSR1: training saves" in second.output and "SIGUSR1" not in first.output
    assert_stopped(run, unbroken)
    assert [event["world_size"] for event in events(run).named("world")] == [2]


def test_torchrun_itself_is_told_to_end(recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    """It calls that a failure, and training did not. But an end of long ago excuses no failure of now."""
    run = tmp_path / "run"
    arguments = ["--nproc", "1", "--log-dir", str(tmp_path / "logs"), str(recipe), *OVERRIDES, f"output_dir={run}"]
    with launched("torchrun.sh", arguments, tmp_path / "output.txt") as launch:
        launch.wait_for_step(run, "sparse", 1)
        (agent,) = children(launch.process.pid)
        os.kill(agent, signal.SIGTERM)
        assert launch.wait() == 0, launch.output
        saved = (run / "checkpoints" / "latest").read_text().strip()
        assert f"torchrun.sh: stopped, and saved as {run}/checkpoints/{saved}" in launch.output
    assert_stopped(run, unbroken)
    (log,) = (tmp_path / "logs").glob("**/0/stderr.log")
    assert "sparse 1/300" in log.read_text() and "sparse 1/300" in launch.output
    failing = [*arguments, "data.mixture=[{path: nowhere.json}]"]
    with launched("torchrun.sh", failing, tmp_path / "output.txt") as launch:
        assert launch.wait() == 1, launch.output
        assert "nowhere.json" in launch.output and "stopped, and saved" not in launch.output


def test_ctrl_c_twice(recipe: Path, tmp_path: Path) -> None:
    """A process that stands still keeps the others from saving: the second one does not wait for it."""
    run = tmp_path / "run"
    arguments = ["--nproc", "2", str(recipe), *OVERRIDES, "stages.1.steps=100000", f"output_dir={run}"]
    with launched("torchrun.sh", arguments, tmp_path / "output.txt") as launch:
        launch.wait_for_step(run, "sparse", 1)
        (agent,) = children(launch.process.pid)
        os.kill(children(agent)[1], signal.SIGSTOP)
        launch.press_ctrl_c()
        launch.wait_for_words("another Ctrl-C kills it")
        launch.press_ctrl_c()
        assert launch.wait() == 1, launch.output
        assert_none_left(str(run))
        assert "ended without saving" in launch.output
