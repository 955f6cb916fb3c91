"""The check of the machine it runs on. Needs no torch: it is to take seconds, and torch may be what is broken."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from moe_lvlm.preflight.finding import Finding
from moe_lvlm.preflight.gpus import check_gpus
from moe_lvlm.preflight.host import node_name, versions
from moe_lvlm.preflight.programs import run_program

_COMMAND_LIMIT = 60.0  # seconds
# No check may take longer, whatever it hangs in: a dead file system, a resolver, a driver. More than what a program
# is given, so that the program's own limit speaks first.
_CHECK_LIMIT = 90.0
_GIB = 2**30
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDemands:
    """What a job asks of each node; None: it does not matter. min_gpu_memory: GiB free on each GPU. min_memory: GiB of
    host memory available. disks: folders, and GiB free in each. master: host that must resolve. command: a shell line
    of the site's. min_shared_memory: GiB free in /dev/shm.
    """

    gpus: int | None = None
    min_gpu_memory: float | None = None
    min_memory: float | None = None
    disks: Sequence[tuple[Path, float]] = ()
    master: str | None = None
    command: str | None = None
    min_shared_memory: float = 1.0


def check_node(demands: NodeDemands) -> list[Finding]:
    """Run all checks side by side. One that hangs is a finding too."""
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", _check_versions),
        ("GPUs", partial(check_gpus, count=demands.gpus, min_gpu_memory=demands.min_gpu_memory)),
        ("memory", partial(_check_memory, demands.min_memory)),
        ("/dev/shm", partial(_check_disk, _SHARED_MEMORY, demands.min_shared_memory)),
    ]
    checks += [(f"disk {path}", partial(_check_disk, path, gib)) for path, gib in demands.disks]
    if demands.master is not None:
        checks.append((f"host {demands.master}", partial(_check_master, demands.master)))
    if demands.command is not None:
        checks.append(("command", partial(_check_command, demands.command)))
    started = [(name, _Running(check)) for name, check in checks]
    limit = time.monotonic() + _CHECK_LIMIT
    return [finding for name, running in started for finding in running.get(name, limit)]


class _Running:
    """A check in a thread of its own, which is left behind if it hangs."""

    def __init__(self, check: Callable[[], list[Finding]]) -> None:
        self._check = check
        self._findings: list[Finding] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._findings = self._check()
        except BaseException as error:  # handed to whoever asks
            self._error = error

    def get(self, name: str, limit: float) -> list[Finding]:
        """Its findings, or one that says that there was no answer until `limit` (time.monotonic)."""
        self._thread.join(max(0.0, limit - time.monotonic()))
        if self._thread.is_alive():
            return [Finding(name=name, value="no answer", problem=f"{name}: no answer within {_CHECK_LIMIT:.0f} s")]
        if self._error is not None:
            raise self._error
        return self._findings


def _check_versions() -> list[Finding]:
    return [
        Finding(
            name=name,
            value=version or "not installed",
            problem=f"{name} is not installed" if version is None else None,
            facts={name: version or "none"},
        )
        for name, version in versions().items()
    ]


def _check_memory(min_memory: float | None) -> list[Finding]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    available, total = (kib[name] * 1024 / _GIB for name in ("MemAvailable", "MemTotal"))
    problem = None
    if min_memory is not None and available < min_memory:
        problem = f"{available:.1f} of {total:.1f} GiB of memory are available, asked for {min_memory:g} GiB"
    value = f"{available:.1f} of {total:.1f} GiB available"
    asked = "" if min_memory is None else f"{min_memory:g} GiB"
    return [Finding(name="memory", value=value, asked=asked, problem=problem, facts={"memory_gib": f"{available:.1f}"})]


def _check_disk(path: Path, gib: float) -> list[Finding]:
    """Free space for us, and whether a file can be written."""
    problem = None
    value = ""
    try:
        free = shutil.disk_usage(path).free / _GIB
        value = f"{free:.1f} GiB free"
        if free < gib:
            problem = f"{path}: {free:.1f} GiB free, asked for {gib:g} GiB"
        with tempfile.NamedTemporaryFile(dir=path, prefix=".preflight-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = f"{path}: {error.strerror or error}"
        value = value or "not usable"
    return [Finding(name=str(path), value=value, asked=f"{gib:g} GiB, writable", problem=problem)]


def _check_master(host: str) -> list[Finding]:
    """Where the ranks are to meet. A loopback address in the name of another machine would lead back to this one."""
    name = f"host {host}"
    try:
        addresses = _addresses(host)
    except OSError as error:
        return [Finding(name=name, value="unknown", problem=f"{host} does not resolve: {error.strerror or error}")]
    problem = None
    if not any(_may_lead_there(host, address) for address in addresses):
        problem = f"{host} resolves to {addresses[0]}, which is this machine: see /etc/hosts"
    return [Finding(name=name, value=", ".join(addresses), problem=problem)]


def _addresses(host: str) -> list[str]:
    """In the resolver's order, each once."""
    return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None)))


def _may_lead_there(host: str, address: str) -> bool:
    num_nodes = os.environ.get("SLURM_JOB_NUM_NODES")  # None outside of SLURM, where `host` may be all there is
    if not _is_loopback(address) or num_nodes == "1":
        return True
    here = {name.partition(".")[0] for name in (node_name(), socket.gethostname())}
    if host.partition(".")[0] in here or (num_nodes is None and host in ("localhost", address)):
        return True
    # Several nodes on one machine, as in a cluster for tests, have loopback addresses of their own: 127.0.1.1, ...
    own = {own for own in _own_addresses() if _is_loopback(own)}
    return bool(own) and address not in own | {"127.0.0.1", "::1"}


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback


def _own_addresses() -> list[str]:
    try:
        return _addresses(node_name())
    except OSError:  # a host that cannot resolve its own name has none that we know
        return []


def _check_command(line: str) -> list[Finding]:
    """The site's own check: what it says last is the reason."""
    answer = run_program(["bash", "-c", line], limit=_COMMAND_LIMIT)
    problem = None
    if answer.status is None:
        problem = f"the site's command did not end within {_COMMAND_LIMIT:.0f} s"
    elif answer.status != 0:
        problem = answer.last_line or f"the site's command ended with status {answer.status}"
    value = "killed" if answer.status is None else f"status {answer.status}"
    return [Finding(name="command", value=value, asked="status 0", problem=problem)]
