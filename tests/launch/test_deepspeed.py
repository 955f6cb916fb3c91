"""launch/deepspeed.sh: DeepSpeed's own launcher, on this machine and on two nodes that are both this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launch.conftest import OVERRIDES
from tests.launch.launches import Launch, assert_none_left, children, launched
from tests.launch.nodes import Nodes, free_port
from tests.launch.runs import assert_stopped
from tests.training.launching import events, processes_with

pytestmark = pytest.mark.distributed


def test_one_node(recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    """Ctrl-C saves and ends well, with all processes."""
    run = tmp_path / "run"
    arguments = ["--nproc", "2", str(recipe), *OVERRIDES, f"output_dir={run}"]
    with launched("deepspeed.sh", arguments, tmp_path / "output.txt") as launch:
        launch.wait_for_step(run, "sparse", 1)
        launch.press_ctrl_c()
        assert launch.wait() == 0, launch.output
        assert_none_left(str(run))
    assert_stopped(run, unbroken)
    assert [event["world_size"] for event in events(run).named("world")] == [2]


def test_the_launcher_is_killed(recipe: Path, tmp_path: Path) -> None:
    """DeepSpeed's answer to that is status 0, and processes that go on alone."""
    run = tmp_path / "run"
    arguments = ["--nproc", "1", str(recipe), "stages.0.steps=100000", f"output_dir={run}"]
    with launched("deepspeed.sh", arguments, tmp_path / "output.txt") as launch:
        launch.wait_for_step(run, "tune", 1)
        (runner,) = children(launch.process.pid)
        (node,) = children(runner)
        os.kill(node, signal.SIGKILL)
        assert launch.wait() == 1, launch.output
        assert_none_left(str(run))


def test_two_nodes(nodes: Nodes, recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    """Through ssh and pdsh. What a shell would make something else of arrives as it is."""
    run = tmp_path / "run$t;('x')"
    (tmp_path / "hosts.txt").write_text("# both are this machine\nnode-a slots=2\nnode-b slots=2\n")
    arguments = ["--hostfile", str(tmp_path / "hosts.txt"), "--nproc", "1", "--master-addr=127.0.0.1"]
    arguments += [f"--master-port={free_port()}", str(recipe), *OVERRIDES, f"output_dir={run}"]
    words = 'a "b" $HOME `c` \\d'
    environment = nodes.environment | {"MOE_LVLM_WORDS": words, "HF_TOKEN": "secret"}
    with launched("deepspeed.sh", arguments, tmp_path / "output.txt", **environment) as launch:
        launch.wait_for_step(run, "sparse", 1)
        ranks = environments_of_ranks(launch, run)
        launch.process.send_signal(signal.SIGTERM)
        assert launch.wait() == 0, launch.output
        assert_none_left(str(run))
    assert_stopped(run, unbroken)
    assert ranks.keys() == {"0", "1"}
    for one in ranks.values():
        assert one["MOE_LVLM_WORDS"] == words
        assert one["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
        assert one["DS_ACCELERATOR"] == "cpu" and one["LOCAL_RANK"] == "0" and "HF_TOKEN" not in one
    assert "secret" not in launch.output


def environments_of_ranks(launch: Launch, run: Path) -> dict[str, dict[str, str]]:
    """By rank, the environment of the processes that train there."""
    found = {}
    for pid in processes_with(str(run)):
        entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
        environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        if "RANK" in environment:
            found[environment["RANK"]] = environment
    assert found, launch.output
    return found


def test_a_node_that_cannot_be_reached(nodes: Nodes, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("node-a slots=1\n127.0.0.9 slots=1\n")
    arguments = ["--hostfile", str(tmp_path / "hosts.txt"), str(recipe)]
    with launched("deepspeed.sh", arguments, tmp_path / "output.txt", **nodes.environment) as launch:
        assert launch.wait() == 2, launch.output
    assert "\ndeepspeed.sh: 127.0.0.9: ssh without a password does not work" in launch.output
