"""A fault that waits inside a rank: at its n-th change of the run's folder it is killed, or may write no more."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["kill_all", "kill_one", "tear", "refuse", "count"]
_MOVES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What happens to a rank when it is about to change the run's folder for the `number`-th time (from 1).

    Changes are what Python's audit events tell of: files opened for writing, folders opened (to be synced), renamed,
    made or removed; TensorBoard's files are left out.
    kind: `kill_all` and `kill_one` send SIGKILL to all ranks or to this one. `tear` lets the kernel kill this rank in
        the middle of the next write that takes a file over `bytes`; `refuse` lets such a write fail instead (EFBIG).
        `count` only counts; the number is in the file `notes`-<rank> when the rank ends.
    rank: None is every rank.
    """

    kind: Kind
    rank: int | None
    number: int = 0
    bytes: int = 0
    folder: str = ""
    notes: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def arm(values: Mapping[str, Any], rank: int) -> None:
    """Begin to count in this process if the strike is for this rank."""
    strike = Strike(**values)
    if strike.rank not in (rank, None):
        return
    if strike.kind == "tear":
        # Python ignores the signal at its start, so that a write fails; its default is the end of the process
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    notes = Path(f"{strike.notes}-{rank}")
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if not _is_change(event, arguments, strike.folder):
            return
        seen += 1
        if strike.kind == "count":
            notes.write_text(str(seen), encoding="utf-8")
        elif seen == strike.number:
            _hit(strike)

    sys.addaudithook(hook)


def _hit(strike: Strike) -> None:
    if strike.kind == "kill_all":
        os.killpg(0, signal.SIGKILL)
    elif strike.kind == "kill_one":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (strike.bytes, resource.RLIM_INFINITY))


def _is_change(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        is_change = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY))
        return is_change and _is_inside(path, folder)
    if event not in _MOVES:
        return False
    # inside of a tree that is being removed, names are relative to an open folder
    return _is_inside(arguments[0], folder) or not _is_absolute(arguments[0])


def _is_inside(path: Any, folder: str) -> bool:
    if isinstance(path, int) or path is None:
        return False
    text = os.fsdecode(path)
    return text.startswith(folder) and not text.startswith(f"{folder}tensorboard")


def _is_absolute(path: Any) -> bool:
    return not isinstance(path, int) and os.fsdecode(path).startswith("/")
