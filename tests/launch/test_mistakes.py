"""Mistakes on a launcher's command line: status 2 and a sentence, before any process that trains is started."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch.launches import ROOT

NODES = ("--nnodes", "2", "--node-rank", "0", "--master")


def call(script: Path | str, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    line = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(
        line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def assert_refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Status 2, and one line that holds all this."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1
    for words in expected:
        assert words in done.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bogus"], "unknown option '--bogus'"),
        (["quickstart", "--bogus=3"], "unknown option '--bogus'"),
        (["--nproc", "0", "quickstart"], "--nproc '0'; allowed: a whole number, 1 or more"),
        (["--nproc", "two", "quickstart"], "--nproc 'two'; allowed: a whole number"),
        (["quickstart", "--nproc"], "--nproc needs a value"),
        (["--nproc", "--fresh", "quickstart"], "--nproc needs a value"),
        (["--until", "--fresh", "quickstart"], "--until needs a value"),
        (["--stop-signal=KILL", "quickstart"], "--stop-signal 'KILL'; allowed: USR1, USR2"),
        (["--resume"], "no RECIPE"),
    ],
)
def test_options(script: str, arguments: list[str], expected: str) -> None:
    assert_refused(call(script, arguments), f"{script}: {expected}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quickstar"], "'quickstar'"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["quickstart", "stages.0.stpes=3"], "did you mean 'steps'?"),
        (["quickstart", "--until", "tunes"], "tunes"),
        (["--nproc", "3", "quickstart", "parallel.expert_parallel_size=1"], "32 x 3 = 96"),
        (["--nproc", "2", "quickstart", "parallel.expert_parallel_size=4"], "parallel.expert_parallel_size: 4"),
    ],
)
def test_recipes(arguments: list[str], expected: str) -> None:
    assert_refused(call("torchrun.sh", arguments), expected)


def test_all_nodes_count() -> None:
    """Two processes on each of four nodes are too many for a batch of 64 in parts of 32."""
    nodes = ["--nnodes=4", "--node-rank=1", "--master=localhost", "--nproc=2"]
    assert_refused(call("torchrun.sh", [*nodes, "quickstart"]), "32 x 8 = 256")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nnodes", "2"], "--nnodes 2 needs --node-rank R"),
        (
            ["--nnodes", "2", "--node-rank", "1"],
            "--nnodes 2 needs --node-rank R, which of them this is, and --master HOST",
        ),
        (["--nnodes", "2", "--master", "localhost"], "--nnodes 2 needs --node-rank R"),
        (
            ["--nnodes", "2", "--node-rank", "2", "--master", "localhost"],
            "--node-rank 2 with --nnodes 2; allowed: 0 to 1",
        ),
        (["--node-rank", "1"], "--node-rank, --master and --rdzv-id are for several nodes; give --nnodes N"),
        (["--master", "localhost"], "--node-rank, --master and --rdzv-id are for several nodes; give --nnodes N"),
        (["--rdzv-id", "7"], "--node-rank, --master and --rdzv-id are for several nodes; give --nnodes N"),
        ([*NODES, "nowhere.invalid"], "--master nowhere.invalid: no such host"),
        ([*NODES, "localhost:0"], "--master: port '0'; allowed: a port, 1 to 65535"),
        ([*NODES, "localhost:65536"], "--master: port '65536'"),
        ([*NODES, "localhost:"], "--master: port ''"),
        ([*NODES, "a:b:c"], "--master 'a:b:c'; allowed: HOST or HOST:PORT"),
    ],
)
def test_nodes_of_torchrun(arguments: list[str], expected: str) -> None:
    assert_refused(call("torchrun.sh", [*arguments, "quickstart"]), f"torchrun.sh: {expected}")


def test_a_name_that_other_nodes_cannot_use(tmp_path: Path) -> None:
    """This machine's own name is 127.0.1.1, as Debian has it, and the master is elsewhere."""
    (tmp_path / "getent").write_text(
        '#!/bin/sh\ncase "$2" in node1) echo 10.0.0.1 STREAM node1 ;; *) echo 127.0.1.1 STREAM "$2" ;; esac\n'
    )
    (tmp_path / "getent").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    arguments = ["--nnodes=4", "--node-rank=1", "--master=node1", "--nproc=2", "quickstart"]
    assert_refused(call("torchrun.sh", arguments, PATH=path), "is 127.0.1.1 here", "set GLOO_SOCKET_IFNAME")
    # past this check, the next one speaks
    assert_refused(call("torchrun.sh", arguments, PATH=path, GLOO_SOCKET_IFNAME="eth0"), "32 x 8 = 256")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert_refused(call("torchrun.sh", [*NODES, f"localhost:{port}", "quickstart"]), f"port {port} is in use")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--include", "node1"], "--include chooses from a hostfile"),
        (["--num-nodes", "2"], "--num-nodes chooses from a hostfile"),
        (["--launcher", "openmpi"], "--launcher 'openmpi'; allowed: pdsh"),
        (["--master-port", "70000"], "--master-port '70000'"),
        (["--hostfile", "nowhere.txt"], "nowhere.txt: no such hostfile"),
        (["--hostfile", "{hosts}", "--include", "node9"], "'node9' is not in the hostfile"),
        (["--hostfile", "{hosts}"], "32 x 4 = 128"),
    ],
)
def test_nodes_of_deepspeed(tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "hosts.txt").write_text("nowhere1.invalid slots=2\nnowhere2.invalid slots=2\n")
    filled = [argument.format(hosts=tmp_path / "hosts.txt") for argument in arguments]
    assert_refused(call("deepspeed.sh", [*filled, "quickstart"]), expected)


def test_a_host_that_does_not_resolve(tmp_path: Path) -> None:
    """Programs named pdsh and ssh are there; the name is looked up before either is asked to go there."""
    (tmp_path / "hosts.txt").write_text("nowhere1.invalid slots=1\nnowhere2.invalid slots=1\n")
    for name in ("pdsh", "ssh"):
        (tmp_path / name).write_text('#!/bin/sh\ncase "$*" in *-G*) echo "hostname $2" ;; *) exit 9 ;; esac\n')
        (tmp_path / name).chmod(0o755)
    done = call(
        "deepspeed.sh",
        ["--hostfile", str(tmp_path / "hosts.txt"), "quickstart"],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert_refused(done, f"deepspeed.sh: {tmp_path / 'hosts.txt'}: nowhere1.invalid: no such host")


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_help(script: str) -> None:
    for arguments in ([], ["--help"], ["quickstart", "-h"]):
        done = call(script, arguments)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.startswith(f"usage: bash launch/{script} ")
        assert "examples:\n" in done.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_nothing_installed(script: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    assert_refused(call(tmp_path / "launch" / script, ["quickstart"]), "no environment at", "launch/install.sh")


def test_a_dry_run_is_said_once() -> None:
    done = call("torchrun.sh", ["--nproc", "2", "quickstart", "--dry-run"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("name: quickstart") == 1
