"""SLURM's own commands: asked whether a script is fit to be submitted, and given it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from moe_lvlm.slurm.site import JobError


def has_slurm() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def check_script(script: Path, *, name: Path | None = None) -> str:
    """What `sbatch --test-only` says of a script that it would take, such as when it might start.

    name: where the script will lie, for errors, if it is not there yet.

    Raises:
        JobError: SLURM would not take it; with SLURM's own reason.
    """
    done = _run(["sbatch", "--test-only", str(script)])
    if done.returncode:
        raise JobError(f"{name or script}: SLURM would refuse this job: {_reason(done.stderr)}")
    return _reason(done.stderr)


def submit_script(script: Path, *, options: Sequence[str] = ()) -> str:
    """Submit a script; the job's id.

    Raises:
        JobError: SLURM did not take it.
    """
    done = _run(["sbatch", "--parsable", *options, str(script)])
    if done.returncode:
        raise JobError(f"{script}: SLURM refused this job: {_reason(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def jobs_in_queue(ids: Iterable[str]) -> dict[str, str]:
    """Which of some jobs wait or run, and their states; of an array, its tasks."""
    wanted = ",".join(ids)
    if not wanted:
        return {}
    # One id that SLURM has forgotten makes it refuse all of them, so the user's whole queue is read.
    done = _run(["squeue", "--noheader", "--me", "--format=%A %i %T"])
    if done.returncode:
        raise JobError(f"squeue failed: {_reason(done.stderr)}")
    found = {}
    for line in done.stdout.splitlines():
        own, name, state = line.split(maxsplit=2)
        if own in wanted.split(",") or name.partition("_")[0] in wanted.split(","):
            found[name] = state
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _reason(stderr: str) -> str:
    """SLURM's sentences without the names of its programs."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ").removeprefix("squeue: ") for line in lines)
