"""The folder of a run's checkpoints: which there are, which is the latest, and what may be removed.

All of it is for one process at a time (rank 0). What it removes are folders whose every file has one of our names.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from moe_lvlm.checkpoint.files import replace_folder, replace_text
from moe_lvlm.checkpoint.layout import (
    LATEST_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointError,
    check_name,
    is_data_file,
    read_json,
)

Log = Callable[[str], None]


def temporary_path(directory: Path, name: str) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return directory / f".{check_name(name)}.tmp"


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete ones (they have a manifest), newest first by their `global_step`; an unreadable one comes last."""
    found = [path for path in directory.iterdir() if _is_checkpoint(path)] if directory.is_dir() else []
    return sorted(found, key=lambda path: (global_step(path), path.name), reverse=True)


def global_step(path: Path) -> int:
    """The step that a checkpoint was saved after, -1 if its state cannot be read (`verify` says why)."""
    try:
        step = read_json(path / STATE_FILE)["global_step"]
    except (CheckpointError, KeyError, TypeError, OSError):
        return -1
    return step if isinstance(step, int) else -1


def read_latest(directory: Path) -> str | None:
    """Name of the newest checkpoint as last published. None without one, or if the file holds no such name."""
    try:
        return check_name((directory / LATEST_FILE).read_text(encoding="utf-8").strip())
    except (FileNotFoundError, ValueError):
        return None


def publish(directory: Path, name: str) -> None:
    """Give a finished temporary folder its name, atomically, and make it the latest."""
    # One of that name may be there: passed over on resuming, since it was damaged or another was asked for.
    replace_folder(temporary_path(directory, name), directory / name)
    replace_text(directory / LATEST_FILE, f"{name}\n")


def tidy(directory: Path, log: Log) -> None:
    """Undo what a killed process left: half-written folders go, a folder that was set aside comes back."""
    for path in sorted(directory.glob(".*.old")):
        target = directory / path.name[1 : -len(".old")]
        if not _is_ours(path):
            continue
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)
            log(f"{target}: brought back, a run was killed while replacing it")
    for path in sorted(directory.glob(".*.tmp")):
        if path.is_dir() and _is_ours(path):
            log(f"{path}: removed, a run was killed while writing it")
            shutil.rmtree(path)


def retire(directory: Path, keep_last: int, protect: Collection[str]) -> list[str]:
    """Remove all but the newest `keep_last` checkpoints and those named in `protect`. Returns the names removed."""
    removed = []
    for path in list_checkpoints(directory)[keep_last:]:
        if path.name in protect or path.name == read_latest(directory):
            continue
        # renamed first: a half-removed checkpoint must not look like one
        doomed = temporary_path(directory, path.name)
        path.rename(doomed)
        shutil.rmtree(doomed)
        removed.append(path.name)
    return removed


def _is_checkpoint(path: Path) -> bool:
    return not path.name.startswith(".") and path.is_dir() and (path / MANIFEST_FILE).is_file()


def _is_ours(path: Path) -> bool:
    return not path.is_symlink() and path.is_dir() and all(is_data_file(entry.name) for entry in path.iterdir())
