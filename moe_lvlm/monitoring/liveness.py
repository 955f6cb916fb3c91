"""Whether somebody trains in a run's folder, as far as its lock tells without touching it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

from moe_lvlm.monitoring.folder import LOCK

_FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, process


def is_locked(run: Path) -> bool | None:
    """True if a process holds the run's lock, False if it was taken on this machine and nobody holds it any more.

    None if that cannot be told: there is no lock, it was taken elsewhere, or the file system has none. For other
    processes than the one that trains, which cannot see its own lock.
    """
    if sys.platform != "linux":
        return None
    try:
        with (run / LOCK).open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            holder = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            content = file.read(4096).decode("utf-8", "replace")
    except OSError:
        return None  # absent, not ours to read, or on a file system without locks
    if holder[0] != fcntl.F_UNLCK:
        return True
    return False if content.strip().endswith(f" on {socket.gethostname()}") else None
