"""Two nodes that are this machine: an ssh server on 127.0.0.1 and 127.0.0.2, with keys of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_SERVER = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
_CLIENT = """\
Host node-a
    HostName 127.0.0.1
Host node-b
    HostName 127.0.0.2
Host *
    Port {port}
    IdentityFile {folder}/user
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


@dataclass(frozen=True)
class Nodes:
    """node-a and node-b. environment: what pdsh needs to reach them."""

    server: subprocess.Popen[bytes]
    environment: dict[str, str]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def missing() -> str | None:
    """What keeps this machine from playing two nodes, or None."""
    programs = [name for name in ("pdsh", "ssh", "ssh-keygen") if shutil.which(name) is None]
    if _sshd() is None:
        programs.append("sshd")
    return f"not installed: {', '.join(programs)} (packages pdsh, openssh-server)" if programs else None


def start_nodes(folder: Path) -> Nodes:
    """Start the server and wait until it answers."""
    port = free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(_SERVER.format(port=port, folder=folder))
    (folder / "ssh_config").write_text(_CLIENT.format(port=port, folder=folder))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it confines itself; packages leave it to the service's start
    sshd = _sshd()
    assert sshd is not None
    with (folder / "sshd.txt").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    limit = time.monotonic() + 60
    while subprocess.run(["ssh", "-F", folder / "ssh_config", "node-b", "true"], capture_output=True).returncode:
        assert server.poll() is None and time.monotonic() < limit, (folder / "sshd.txt").read_text()
        time.sleep(0.1)
    return Nodes(server, {"PDSH_SSH_ARGS_APPEND": f"-F {folder}/ssh_config"})


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
