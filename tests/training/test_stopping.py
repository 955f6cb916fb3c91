"""Ctrl-C, SIGTERM and a stop signal save and leave; the same command goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.conftest import OVERRIDES
from tests.training.launching import ROOT, TIME_LIMIT, Server, assert_no_orphans, events, has_step, processes_with
from tests.training.states import assert_same_checkpoint

LAST = "sparse-000005"


def assert_stopped(run: Path) -> None:
    """It said so, and it saved after the last step that it did."""
    assert not (run / "DONE").exists()
    log = events(run)
    assert [line["event"] for line in log.lines[-2:]] == ["checkpoint", "stopped"]
    step = log.named("step")[-1]
    name = f"{step['stage']}-{step['step']:06d}"
    assert Path(log.lines[-1]["path"]).name == name
    assert (run / "checkpoints" / "latest").read_text().strip() == name


def assert_goes_on(server: Server, command: list[str], run: Path, unbroken: Path) -> None:
    server.run(command)
    assert (run / "DONE").exists()
    assert events(run).steps() == events(unbroken).steps()
    assert_same_checkpoint(run / "checkpoints" / LAST, unbroken / "checkpoints" / LAST)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGINT, []), (signal.SIGTERM, []), (signal.SIGUSR1, ["--stop-signal", "USR1"])],
    ids=["SIGINT", "SIGTERM", "SIGUSR1"],
)
def test_all_processes_get_a_signal(
    number: signal.Signals, options: list[str], server: Server, recipe: Path, unbroken: Path, tmp_path: Path
) -> None:
    """Ctrl-C in a terminal reaches all, and so do SIGTERM from torchrun and SLURM's signals: data workers too."""
    run = tmp_path / "run"
    command = ["train", str(recipe), *OVERRIDES, "data.num_workers=1", f"output_dir={run}", *options]
    job = server.start(command)
    job.wait_until(has_step(run, "tune", 1))
    job.signal(number)
    assert job.wait() == [0, 0], job.output
    assert_no_orphans(job)
    assert_stopped(run)
    assert_goes_on(server, command, run, unbroken)


@pytest.mark.distributed
def test_torchrun_gets_sigterm(server: Server, recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    """As from a batch system: to the launcher alone, which hands it on and then itself ends with status 1."""
    run = tmp_path / "run"
    command = ["train", str(recipe), *OVERRIDES, f"output_dir={run}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [*launcher, "-m", "moe_lvlm", *command], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            limit = time.monotonic() + TIME_LIMIT
            while not has_step(run, "tune", 1)():
                assert process.poll() is None and time.monotonic() < limit, (tmp_path / "output.txt").read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIME_LIMIT) == 1, (tmp_path / "output.txt").read_text()
            assert processes_with(str(run)) == []
        finally:
            for pid in [process.pid, *processes_with(str(run))]:
                if process.poll() is None or pid != process.pid:
                    os.killpg(os.getpgid(pid), signal.SIGKILL)
    assert_stopped(run)
    assert_goes_on(server, command, run, unbroken)


@pytest.mark.distributed
def test_asked_between_two_stages(server: Server, recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    """One rank is; the next stage's model is not built for it."""
    run = tmp_path / "run"
    command = ["train", str(recipe), *OVERRIDES, f"output_dir={run}"]
    server.run(["train_and_ask_between", *command])
    assert_stopped(run)
    assert [line["stage"] for line in events(run).named("stage")] == ["tune"]
    assert_goes_on(server, command, run, unbroken)
