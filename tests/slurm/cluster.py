"""The local SLURM cluster as tests use it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "local_cluster.sh"
COMMANDS = ("sbatch", "scontrol", "slurmctld", "slurmd", "munged")
TIME_LIMIT = 120.0  # for a loaded machine; what is waited for takes seconds
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class ClusterError(RuntimeError):
    """The cluster does not come up, or a command of SLURM has failed."""


def missing_commands() -> list[str]:
    """Those of SLURM's programs that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in COMMANDS if shutil.which(name, path=path) is None]


def free_ports(number: int) -> int:
    """The first of that many free ports in a row, below those that the system hands out by itself."""
    for _ in range(100):
        first = random.randrange(10000, 32000 - number)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + number):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise ClusterError(f"no {number} free ports in a row found between 10000 and 32000")


def wait_until(condition: Callable[[], bool], what: str, limit: float = TIME_LIMIT) -> None:
    """Wait for something; AssertionError says what it was when it does not come within limit seconds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {limit} s: {what}")
        time.sleep(0.2)


class Cluster:
    """A cluster of its own ports and addresses in a new temporary folder; start() brings it up.

    kill_wait: seconds between SIGTERM and SIGKILL, as in SLURM's KillWait. options: more for local_cluster.sh start.
    """

    def __init__(self, *options: str, nodes: int = 3, cpus: int = 4, kill_wait: int = 10) -> None:
        # A socket's path is short, pytest's own folders are not.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        port = free_ports(nodes + 1)
        self.network = f"127.{port // 256}.{port % 256}"  # that of no other cluster, as the port is
        self.nodes = [f"n{node}" for node in range(1, nodes + 1)]
        numbers = {"nodes": nodes, "cpus": cpus, "kill-wait": kill_wait, "port": port}
        self.options = [text for name, number in numbers.items() for text in (f"--{name}", str(number))]
        self.options += ["--network", self.network, *options]
        # Tests may themselves run in a job of a true cluster.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self.jobs: list[str] = []

    # ---- the cluster itself

    def script(self, action: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run local_cluster.sh for this cluster."""
        command = ["bash", str(SCRIPT), action, str(self.folder), *options]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def start(self) -> str:
        """Bring up what does not run. Gives what the script printed."""
        result = self.script("start", *self.options)
        if result.returncode:
            raise ClusterError(f"local_cluster.sh start: {result.stderr[-2000:]}")
        return result.stdout

    def stop(self) -> None:
        """End every process of the cluster; its folder stays."""
        result = self.script("stop")
        if result.returncode:
            raise ClusterError(f"local_cluster.sh stop: {result.stderr[-2000:]}")

    def remove(self) -> None:
        """Remove the folder of the stopped cluster."""
        shutil.rmtree(self.folder)

    def tails(self) -> str:
        """The ends of the logs: the daemons', then those of the jobs that were submitted last."""
        logs = sorted((self.folder / "log").glob("*.log"))
        for job in self.jobs[-3:]:
            with contextlib.suppress(ClusterError):  # SLURM forgets jobs that ended ten minutes ago
                logs.append(Path(self.fields(job).get("StdOut", "")))
        texts = [(log, log.read_text(errors="replace")) for log in logs if log.is_file()]
        return "\n".join(f"== {log}\n" + "\n".join(text.splitlines()[-15:]) for log, text in texts)

    # ---- jobs

    def run(self, *command: str) -> str:
        """What a command of SLURM prints. ClusterError when it fails."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ClusterError(f"{' '.join(command)}: status {result.returncode}: {result.stderr}")
        return result.stdout

    def sbatch(self, script: Path | str, *options: str) -> str:
        """Submit a script, a file or a text; the job's id. Without an --output its log is in the cluster's folder."""
        if isinstance(script, str):
            path = self.folder / f"script-{len(self.jobs)}.sbatch"
            path.write_text(f"#!/bin/bash\n{script}", encoding="utf-8")
            options = (f"--output={self.folder}/job-%j.log", "--open-mode=append", *options)
        else:
            path = script
        self.jobs.append(self.run("sbatch", "--parsable", *options, str(path)).strip())
        return self.jobs[-1]

    def log(self, job: str) -> str:
        """What a job has written so far, where its script was given to sbatch() as a text."""
        return (self.folder / f"job-{job}.log").read_text(encoding="utf-8", errors="replace")

    def fields(self, job: str) -> dict[str, str]:
        """What SLURM says of a job ("17", or "17_3" in an array): JobState, Restarts, Reason, ... Values with blanks are cut."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job: str) -> str:
        """The job's state, such as RUNNING."""
        return self.fields(job)["JobState"]

    def wait_for(self, job: str, states: str | Collection[str], limit: float = TIME_LIMIT) -> str:
        """Wait for one of the states, and say which. AssertionError when the job ends in another, or limit s are over."""
        wanted = {states} if isinstance(states, str) else set(states)

        def is_there() -> bool:
            state = self.state(job)
            assert state in wanted or state not in ENDED, f"job {job}: {state}, not {wanted}\n{self.tails()}"
            return state in wanted

        wait_until(is_there, f"job {job} in {wanted}", limit)
        return self.state(job)

    def wait_for_start(self, job: str, attempt: int, limit: float = TIME_LIMIT) -> None:
        """Wait until a job runs for the first time (attempt 1), or after so many requeues and one."""

        def is_there() -> bool:
            fields = self.fields(job)
            assert fields["JobState"] not in ENDED, f"job {job} has ended: {fields['JobState']}\n{self.tails()}"
            return fields["JobState"] == "RUNNING" and int(fields["Restarts"]) >= attempt - 1

        wait_until(is_there, f"attempt {attempt} of job {job}", limit)

    def cancel(self, job: str, *options: str) -> None:
        """Cancel a job, or send it a signal (options: --signal=USR1)."""
        self.run("scancel", *options, job)

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are free."""
        jobs = set(self.run("squeue", "--noheader", "--format=%F").split())
        if jobs:
            self.run("scancel", *jobs)
            wait_until(lambda: not self.run("squeue", "--noheader").strip(), "the end of cancelled jobs")

    # ---- nodes

    def node_state(self, node: str) -> str:
        """The node's state, such as idle, or down* for one that does not answer."""
        return self.run("sinfo", "--noheader", "--partition=batch", f"--nodes={node}", "--format=%T").strip()

    def pids_of(self, host: str) -> list[int]:
        """What runs on a node ("n1"; jobs too), or as the "controller": known by the hosts file that it sees."""
        pids = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended, or is another user's
                if (process / "root/etc/hosts").samefile(self.folder / "hosts" / host):
                    pids.append(int(process.name))
        return pids

    def kill_node(self, node: str) -> None:
        """Kill everything on a node at once, as when its power goes. start() brings it back."""

        def is_dead() -> bool:
            pids = self.pids_of(node)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(is_dead, f"the end of {node}")
