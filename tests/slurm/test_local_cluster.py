"""launch/slurm/local_cluster.sh: a SLURM of several nodes on this machine, and its end without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, Cluster, ClusterError, free_ports, wait_until
from tests.slurm.conftest import started_cluster

slurm = pytest.mark.slurm


def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster of one node that the test may stop."""
    cluster = started_cluster(nodes=1)
    yield cluster
    cluster.stop()
    cluster.remove()


def daemons(cluster: Cluster) -> set[int]:
    return {pid for host in ("controller", *cluster.nodes) for pid in cluster.pids_of(host)}


def is_alive(pid: int) -> bool:
    """A process that has ended may stay as a zombie until its parent looks."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@slurm
def test_start_of_a_running_cluster_changes_nothing(cluster: Cluster) -> None:
    before = daemons(cluster)
    assert cluster.start() == f"export SLURM_CONF={cluster.folder}/slurm.conf\n"
    assert daemons(cluster) == before
    assert len(before) >= 5  # munged, slurmctld, three slurmd
    assert cluster.run("sinfo", "-h", "-p", "batch", "-o", "%D %c %T") == "3 4 idle\n"


@slurm
def test_running_cluster_refuses_other_options(cluster: Cluster) -> None:
    result = cluster.script("start", *cluster.options, "--cpus", "5")
    assert result.returncode == 2
    assert "runs with other options" in result.stderr
    assert cluster.run("sinfo", "-h", "-p", "batch", "-o", "%c") == "4\n"


@slurm
def test_status_names_what_does_not_run(cluster: Cluster) -> None:
    result = cluster.script("status")
    assert (result.returncode, result.stderr) == (0, "")
    assert "n3: idle" in result.stdout
    cluster.kill_node("n2")
    result = cluster.script("status")
    assert result.returncode == 1
    assert "n2: does not run\n" in result.stdout
    assert "n1: runs, process " in result.stdout


@slurm
def test_job_sees_nodes_by_name(cluster: Cluster) -> None:
    script = "srun --ntasks-per-node=1 bash -c 'echo \"$(hostname) $(getent hosts n1) $(getent hosts n2)\"'"
    job = cluster.sbatch(script, "--nodes=2")
    cluster.wait_for(job, "COMPLETED")
    lines = sorted(" ".join(line.split()) for line in cluster.log(job).splitlines())
    addresses = f"{cluster.network}.1 n1 {cluster.network}.2 n2"
    assert lines == [f"n1 {addresses}", f"n2 {addresses}"]


@slurm
def test_requeued_job_runs_again_elsewhere(cluster: Cluster) -> None:
    script = """
echo "restart ${SLURM_RESTART_COUNT:-0} on $(hostname)"
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" && scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(hostname)"
fi
"""
    job = cluster.sbatch(script, "--requeue")
    cluster.wait_for(job, "COMPLETED")
    said = [line.split() for line in cluster.log(job).splitlines() if line.startswith("restart")]
    assert [line[1] for line in said] == ["0", "1"]
    assert {said[0][3], said[1][3]} < {"n1", "n2", "n3"}
    assert said[0][3] != said[1][3]
    assert cluster.fields(job)["Restarts"] == "1"


@slurm
@pytest.mark.parametrize("partition", ["batch", "grace"])
def test_urgent_job_takes_the_place_of_another(cluster: Cluster, partition: str) -> None:
    # In `grace` the step is told first, and only the step: the script goes on. Files, as srun drops a dying step's words.
    script = """
trap 'touch script-told' TERM
srun bash -c 'trap "touch step-told; exit 0" TERM; touch ready; while :; do sleep 0.1; done'
touch went-on
"""
    folder = cluster.folder / partition
    folder.mkdir()
    job = cluster.sbatch(script, "--nodelist=n1", "--requeue", f"--partition={partition}", f"--chdir={folder}")
    wait_until((folder / "ready").exists, "the step's start")
    urgent = cluster.sbatch("true", "--partition=urgent", "--nodelist=n1", "--exclusive")
    wait_until((folder / "step-told").exists, "the step's SIGTERM")
    if partition == "batch":
        wait_until((folder / "script-told").exists, "the script's SIGTERM")
        wait_until(lambda: cluster.fields(job)["Restarts"] == "1", "the requeue")
    else:
        cluster.wait_for(job, "COMPLETED")
        assert (folder / "went-on").exists()
        assert not (folder / "script-told").exists()
        assert cluster.fields(job)["Restarts"] == "0"
    cluster.wait_for(urgent, "COMPLETED")


@slurm
def test_partition_for_members(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="partition members needs --account=members"):
        cluster.run("sbatch", "--test-only", "--partition=members", "--wrap=true")
    cluster.run("sbatch", "--test-only", "--partition=members", "--account=members", "--wrap=true")


@slurm
def test_dead_node_is_noticed_and_comes_back(cluster: Cluster) -> None:
    job = cluster.sbatch("sleep 600", "--nodelist=n3", "--no-requeue")
    cluster.wait_for_start(job, 1)
    others = cluster.pids_of("n1")
    cluster.kill_node("n3")
    cluster.wait_for(job, "NODE_FAIL")
    assert cluster.node_state("n3") == "down*"
    cluster.start()
    assert cluster.node_state("n3") == "idle"
    assert cluster.pids_of("n1") == others


@slurm
def test_install_says_what_is_there(cluster: Cluster) -> None:
    version = cluster.run("sbatch", "--version").strip()  # "slurm-wlm 22.05.8"
    result = call("install")
    assert (result.returncode, result.stdout) == (0, f"local_cluster.sh: {version} and munge are installed\n")


@slurm
def test_stop_cancels_jobs(own_cluster: Cluster) -> None:
    running = own_cluster.sbatch("sleep 600", "--requeue", "--exclusive")
    own_cluster.wait_for_start(running, 1)
    waiting = own_cluster.sbatch("sleep 600")
    own_cluster.stop()
    assert own_cluster.script("status").returncode == 1
    own_cluster.start()
    own_cluster.wait_for(running, "CANCELLED")
    own_cluster.wait_for(waiting, "CANCELLED")


@slurm
def test_stop_leaves_no_process_even_after_its_daemons_were_killed(own_cluster: Cluster) -> None:
    # A process with nothing of the job's: another session, an empty environment, a parent that has gone.
    job = own_cluster.sbatch(
        "(setsid env -i /bin/sleep 600 & echo $! >stray); sleep 600", f"--chdir={own_cluster.folder}"
    )
    written = own_cluster.folder / "stray"
    wait_until(lambda: written.exists() and written.read_text().endswith("\n"), "the job's process")
    own_cluster.wait_for(job, "RUNNING")
    stray = int(written.read_text())
    processes = daemons(own_cluster)
    assert stray in processes
    for name in ("slurmctld", "n1", "munged"):
        os.kill(int((own_cluster.folder / "pid" / f"{name}.pid").read_text()), signal.SIGKILL)
    assert is_alive(stray)
    own_cluster.stop()
    assert not daemons(own_cluster)
    assert not [pid for pid in processes if is_alive(pid)]


@slurm
def test_ports_in_use(own_cluster: Cluster) -> None:
    own_cluster.stop()
    port = int(own_cluster.options[own_cluster.options.index("--port") + 1])
    message = rf"port {port + 1}, for n1, is in use .* --port"
    with socket.create_server(("127.0.0.1", port + 1)), pytest.raises(ClusterError, match=message):
        own_cluster.start()
    assert not daemons(own_cluster)


def test_help_names_every_option() -> None:
    result = call("--help")
    assert result.returncode == 0
    for word in ("install", "status", "--nodes", "--gpus", "--port", "--kill-wait", "members", "example:"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "install, start, stop or status is expected"),
        (["begin"], "'begin'; allowed: install, start, stop, status"),
        (["start"], "start needs DIR"),
        (["start", "--nodes", "2"], "start needs DIR"),
        (["start", "/nowhere", "--nodes"], "--nodes: an option of start and its value are expected"),
        (["start", "/nowhere", "--nodes", "0"], "--nodes '0'; allowed: a whole number from 1 to 64"),
        (["start", "/nowhere", "--cpus", "four"], "--cpus 'four'; allowed: a whole number"),
        (["start", "/nowhere", "--network", "10.0.0"], "--network '10.0.0'; allowed: 127.B.C"),
        (["start", "/nowhere", "--gpu-type", "A 100"], "--gpu-type 'A 100'; allowed"),
        (["start", "/nowhere", "--node", "2"], "unknown option '--node'"),
        (["start", "/no where"], "DIR '/no where'; allowed in its path"),
        (["start", "/nowhere/" + 70 * "x"], "a path of 79 characters; allowed: 70"),
        (["stop", "/nowhere"], "no cluster in '/nowhere'"),
        (["status", "/nowhere"], "no cluster in '/nowhere'"),
        (["stop", "/nowhere", "--nodes", "2"], "stop takes DIR and no more"),
        (["install", "now"], "install takes no arguments"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_missing_packages(tmp_path: Path) -> None:
    # The machine's own commands are out of reach: only bash's and these.
    for name in ("bash", "realpath"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    result = call("start", "/nowhere", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "not installed: " in result.stderr
    assert "sbatch" in result.stderr
    assert result.stderr.endswith("local_cluster.sh install\n")
    result = call("install", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "no apt-get here" in result.stderr
    assert "slurm-wlm and munge for apt-get" in result.stderr


def test_free_ports_are_free() -> None:
    first = free_ports(4)
    for port in range(first, first + 4):
        socket.create_server(("127.0.0.1", port)).close()
