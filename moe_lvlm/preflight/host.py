"""What this machine is called and which versions it runs. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from moe_lvlm import __version__

PACKAGES = ("torch", "deepspeed", "transformers")


def node_name() -> str:
    """The node's name as SLURM knows it, elsewhere the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def versions() -> Mapping[str, str | None]:
    """By program: its version, or None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "moe-lvlm": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
