"""A run says who takes part in it, and collectives wait for longer than the watchdog."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest

from moe_lvlm.parallel.process_group import batch_job, group_timeout, host_name
from tests.training.launching import Server, events

VARIABLES = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURMD_NODENAME", "MOE_LVLM_ATTEMPT")


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"SLURM_JOB_ID": "17", "MOE_LVLM_ATTEMPT": "2"}, {"job": "17", "attempt": 2}),
        # the last task of an array has the array's id
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, {"job": "12_3"}),
    ],
)
def test_the_batch_job(
    environment: dict[str, str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert batch_job() == expected


@pytest.mark.parametrize("attempt", ["0", "two", "-1"])
def test_an_attempt_that_is_none(attempt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LVLM_ATTEMPT", attempt)
    with pytest.raises(ValueError, match=f"MOE_LVLM_ATTEMPT='{attempt}'; allowed: a whole number above 0"):
        batch_job()


def test_the_host_by_its_name_in_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_name() == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert host_name() == "n7"


@pytest.mark.parametrize(("hang_timeout", "minutes"), [(0, 30), (60, 30), (1800, 35), (7200, 125)])
def test_collectives_outlast_the_watchdog(hang_timeout: float, minutes: int) -> None:
    assert group_timeout(hang_timeout) == timedelta(minutes=minutes)


@pytest.mark.distributed
def test_each_start_is_logged(server: Server, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", str(recipe), f"output_dir={run}", "--until", "tune"]
    job = server.start(command, SLURM_JOB_ID="17", SLURMD_NODENAME="n1", MOE_LVLM_ATTEMPT="2")
    assert job.wait() == [0, 0], job.output
    (world,) = events(run).named("world")
    del world["event"], world["time"]
    assert world == {"world_size": 2, "hosts": ["n1", "n1"], "job": "17", "attempt": 2}


@pytest.mark.distributed
def test_all_groups_get_the_timeout(server: Server) -> None:
    """DeepSpeed's too, that is those made without saying any."""
    job = server.run(["wait_in_a_new_group"])
    assert "Timed out waiting 250ms" in job.output
