"""The command line on 1, 2 and 4 processes: the same losses at the same micro-batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from tests.parallel.jobs import command
from tests.parallel.rank_server import RankServer
from tests.tiny_run import write_run_inputs

pytestmark = pytest.mark.distributed
Run = Callable[..., list[dict[str, Any]]]

NUM_STEPS = 3 + 5


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe: a dense stage, then a sparse one with LTDR; images and text in one mixture."""
    return write_run_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def steps(ranks: RankServer, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The logged steps of `moe-lvlm train` with some overrides, on some processes."""

    def run(*overrides: str, world: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("run")
        arguments = ("train", str(recipe), f"output_dir={folder / 'out'}", *overrides)
        assert ranks.run(command, *arguments, world=world, folder=folder) == [0] * world
        return logged_steps(folder / "out")

    return run


@pytest.fixture(scope="session")
def one_process(steps: Run) -> list[dict[str, Any]]:
    return steps(world=1)


def logged_steps(folder: Path) -> list[dict[str, Any]]:
    """The step events of a run's log."""
    assert (folder / "DONE").exists()
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "step"]


def assert_same(steps: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(steps) == len(expected) == NUM_STEPS
    for key in ("loss", "language_loss", "grad_norm"):
        assert_close([step[key] for step in steps], [step[key] for step in expected], rtol=1e-5, atol=1e-5)
    for key in ("stage", "step", "tokens", "epoch", "learning_rate", "expert_load"):
        assert [step[key] for step in steps] == [step[key] for step in expected], key


def torchrun(world: int, *arguments: str) -> None:
    """The command that a user types."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        [*line, "-m", "moe_lvlm", *arguments],
        cwd=Path(__file__).parents[2],
        env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_torchrun(recipe: Path, one_process: list[dict[str, Any]], tmp_path: Path, world: int) -> None:
    torchrun(world, "train", str(recipe), f"output_dir={tmp_path / 'out'}", f"parallel.expert_parallel_size={world}")
    assert_same(logged_steps(tmp_path / "out"), one_process)


@pytest.mark.parametrize(("world", "size", "deepspeed"), [(2, 1, "zero3"), (4, 2, "zero1"), (4, 4, "zero3")])
def test_more_processes(steps: Run, one_process: list[dict[str, Any]], world: int, size: int, deepspeed: str) -> None:
    several = steps(f"parallel.expert_parallel_size={size}", f"parallel.deepspeed={deepspeed}", world=world)
    assert_same(several, one_process)


def test_the_run_is_worth_comparing(one_process: list[dict[str, Any]]) -> None:
    """Both stages learn, clipping is active somewhere, and some tokens are tail tokens."""
    for stage in ("tune", "sparse"):
        losses = [step["language_loss"] for step in one_process if step["stage"] == stage]
        assert losses[-1] < losses[0] - 0.01
    assert max(step["grad_norm"] for step in one_process) > 1
    shares = [share for step in one_process if step["tail_share"] for share in step["tail_share"].values()]
    assert any(0 < share < 1 for share in shares)


def test_global_tail(steps: Run) -> None:
    """Two ranks with micro-batches of 2 and one threshold for both choose as one process does for a micro-batch of 4.

    Without a balance loss nothing else depends on the size of a micro-batch. But then the routers' first gradient is 0
    but for rounding, since copied experts are equal: a large eps keeps Adam from making a step of its sign.
    """
    common = ("moe.balance.on=[]", "train.optimizer.eps=1.0e-3")
    whole = steps(*common, "stages.0.micro_batch=4", "stages.1.micro_batch=4", world=1)
    halves = steps(*common, "moe.router.tail_scope=global", "parallel.expert_parallel_size=2", world=2)
    assert_same(halves, whole)
    alone = steps(*common, "parallel.expert_parallel_size=2", world=2)
    loads = [[step["expert_load"] for step in run if step["stage"] == "sparse"] for run in (whole, alone)]
    assert loads[0] != loads[1], "the scopes must differ for this to show anything"
