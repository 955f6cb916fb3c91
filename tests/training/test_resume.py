"""Whatever kills a run, the same command goes on, and in the end nothing shows that it was killed."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.training.conftest import OVERRIDES
from tests.training.launching import Server, events, kill_after
from tests.training.states import assert_same_checkpoint

pytestmark = pytest.mark.distributed

CHECKPOINTS = [*(f"tune-{step:06d}" for step in range(1, 4)), *(f"sparse-{step:06d}" for step in range(1, 6))]


def assert_same_run(run: Path, unbroken: Path) -> None:
    """All checkpoints, and all steps' numbers, exactly."""
    assert (run / "DONE").exists()
    assert events(run).steps() == events(unbroken).steps()
    for name in CHECKPOINTS:
        assert_same_checkpoint(run / "checkpoints" / name, unbroken / "checkpoints" / name)


def kill_in_save(server: Server, command: list[str], fsync: int) -> None:
    job = server.start(["train_and_die", str(fsync), *command])
    assert set(job.wait()) == {-signal.SIGKILL}, job.output


def test_killed_at_steps_and_in_saves(server: Server, recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", str(recipe), *OVERRIDES, f"output_dir={run}"]
    kill_in_save(server, command, 4)  # before there is any checkpoint; the first two are the recipe's
    assert list((run / "checkpoints").glob(".*.tmp"))
    kill_after(server, command, run, "tune", 2)
    kill_in_save(server, command, 10)
    kill_after(server, command, run, "sparse", 2)
    kill_in_save(server, command, 17)
    assert not (run / "DONE").exists()
    server.run(command)
    assert_same_run(run, unbroken)
    assert len(events(run).named("resume")) >= 3
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    "settings",
    [("parallel.deepspeed=zero3",), ("train.precision=bf16",), ("train.checkpoint.background=true",)],
    ids=["zero3", "bf16", "background"],
)
def test_killed_under(settings: tuple[str, ...], server: Server, recipe: Path, tmp_path: Path) -> None:
    command = ["train", str(recipe), *OVERRIDES, *settings]
    server.run([*command, f"output_dir={tmp_path / 'unbroken'}"])
    broken = [*command, f"output_dir={tmp_path / 'broken'}"]
    kill_after(server, broken, tmp_path / "broken", "sparse", 2)
    server.run(broken)
    assert events(tmp_path / "broken").named("resume")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")


def stopped_at(unbroken: Path, run: Path, name: str) -> None:
    """A copy of a run as it was when that checkpoint was its newest one."""
    shutil.copytree(unbroken, run, ignore=shutil.ignore_patterns("DONE", "log.jsonl", "tensorboard"))
    for later in CHECKPOINTS[CHECKPOINTS.index(name) + 1 :]:
        shutil.rmtree(run / "checkpoints" / later)
    (run / "checkpoints" / "latest").write_text(f"{name}\n")


@pytest.mark.parametrize(
    ("newest", "world", "settings"),
    [
        ("tune-000002", 1, ("parallel.expert_parallel_size=1", "parallel.deepspeed=zero1")),
        ("sparse-000002", 2, ("parallel.expert_parallel_size=1", "parallel.deepspeed=zero3")),
    ],
    ids=["world1-zero1", "world2-zero3"],
)
def test_another_topology_goes_on(
    newest: str, world: int, settings: tuple[str, ...], server: Server, recipe: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped_at(unbroken, run, newest)
    server.run(["train", str(recipe), *OVERRIDES, *settings, f"output_dir={run}", "train.log_every=1"], world=world)
    steps, expected = events(run).steps(), events(unbroken).steps()
    done = CHECKPOINTS.index(newest) + 1
    assert len(steps) == len(expected) - done > 0
    for place, values in steps.items():
        assert values["loss"] == pytest.approx(expected[place]["loss"], abs=1e-5)
        assert values["grad_norm"] == pytest.approx(expected[place]["grad_norm"], abs=1e-4)
        for key in ("tokens", "learning_rate", "epoch"):
            assert values[key] == expected[place][key]
