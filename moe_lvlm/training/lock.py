"""One run a folder: who trains in it holds its lock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
# What a file system without locks answers (Lustre mounted without them, some FUSE).
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FolderInUseError(ValueError):
    """Another process trains in this folder."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[str | None]:
    """Hold the folder's lock; the kernel gives it back when this process ends, however it ends.

    Gives None, or a sentence that says why the folder could not be locked: a file system that has no locks. The lock
    is a POSIX record lock: it holds across the nodes of a shared file system, and children do not inherit it, so that
    a data worker which outlives a killed run for a moment keeps nobody out.

    Raises:
        FolderInUseError: another process holds it; the message names the folder, and that process's host and id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("a+", encoding="utf-8") as file:
        problem = None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise FolderInUseError(
                    f"{folder}: another run trains here (process {holder}); wait for it, stop it, or choose another "
                    "output_dir"
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            problem = f"{path}: the file system has no locks ({error.strerror}): a second run here goes unnoticed"
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield problem
