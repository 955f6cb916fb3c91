"""A small disk that can be filled: a tmpfs, where this process may mount one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BALLAST = "ballast"
_BLOCK = bytes(2**16)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[str | None]:
    """Mount a tmpfs of `size` bytes on a new folder while the context lasts. Gives None, or why it cannot be done."""
    path.mkdir(parents=True)
    if shutil.which("mount") is None:
        yield "there is no mount command"
        return
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        yield f"mount: {mounted.stderr.strip()}"
        return
    try:
        yield None
    finally:
        # lazily if need be: a mount that stays would be found by the next user of the folder
        if subprocess.run(["umount", str(path)], capture_output=True).returncode:
            subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path, *, leave: int) -> None:
    """Write a file until no more than `leave` bytes are free."""
    with (disk / BALLAST).open("wb", buffering=0) as file:
        try:
            while (excess := shutil.disk_usage(disk).free - leave) > 0:
                file.write(_BLOCK[: min(excess, len(_BLOCK))])
        except OSError:
            return  # somebody else wrote too: it is full


def make_room(disk: Path) -> None:
    """Remove that file."""
    (disk / BALLAST).unlink()
