"""A run's folder, seen from outside: where its files lie, and which folders are runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RECIPE = "recipe.yaml"
LOG = "log.jsonl"
LOCK = ".lock"
DONE = "DONE"
CHECKPOINTS = "checkpoints"
BAD_SAMPLES = "bad_samples.jsonl"
METRICS = "metrics.json"
RANK_LOGS = "logs"
HANGS = "hangs"
SLURM = "slurm"
EVENTS = Path(SLURM, "events.jsonl")
EXCLUDED = Path(SLURM, "excluded")
SUBMITTED_RECIPE = Path(SLURM, RECIPE)

# Beside a recipe.yaml of its own one of these makes a folder a run; a user's recipe may lie alone.
_MARKS = (LOG, LOCK, CHECKPOINTS, DONE, SLURM, "environment.txt")
_DEPTH = 2


def is_run(folder: Path) -> bool:
    """Whether training has begun in the folder, or was submitted to."""
    if (folder / SUBMITTED_RECIPE).is_file():
        return True
    return (folder / RECIPE).is_file() and any((folder / mark).exists() for mark in _MARKS)


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders that are runs, and in place of one that is none the runs in it (of a sweep), each once.

    Raises:
        ValueError: a folder that does not exist, is no run, and holds none.
    """
    found: list[Path] = []
    for folder in folders:
        if is_run(folder):
            found.append(folder)
            continue
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; a run's folder is expected, such as runs/quickstart")
        inside = _runs_below(folder, _DEPTH)
        if not inside:
            raise ValueError(
                f"{folder}: not a run's folder and none in it is: {RECIPE} with {LOG} (`moe-lvlm train` writes them) and "
                f"{SUBMITTED_RECIPE} (`moe-lvlm submit`) are missing"
            )
        found += inside
    return list(dict.fromkeys(found))


def the_run(folder: Path) -> Path:
    """The folder itself.

    Raises:
        ValueError: it is no run; one that holds runs is told from one that does not.
    """
    if is_run(folder):
        return folder
    inside = find_runs([folder])
    raise ValueError(f"{folder}: holds runs but is none; give one of them, such as {inside[0]}")


def _runs_below(folder: Path, depth: int) -> list[Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        if is_run(path):
            found.append(path)
        elif depth > 1:
            found += _runs_below(path, depth - 1)
    return found
