"""How many runs go beside each other, of how many processes, and on what."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """jobs: runs beside each other. processes: of one run. gpus: the names that CUDA_VISIBLE_DEVICES has for those in
    use; none where all compute on the CPU."""

    jobs: int
    processes: int
    gpus: tuple[str, ...] = ()

    @property
    def gpus_by_job(self) -> list[tuple[str, ...]]:
        """A share for each job that runs at a time; empty without GPUs."""
        if not self.gpus:
            return []
        return [self.gpus[job * self.processes : (job + 1) * self.processes] for job in range(self.jobs)]


def choose_machine(*, jobs: int | None, processes: int | None, scale: str) -> Machine:
    """Defaults: at full scale one run on all GPUs; else one process a run, and as many runs as there is room for.

    Raises:
        ValueError: the jobs need more GPUs than there are.
    """
    gpus = visible_gpus()
    each = processes or (max(len(gpus), 1) if scale == "full" else 1)
    if len(gpus) < each:
        gpus = ()  # as launch/torchrun.sh has it: with fewer GPUs than processes all compute on the CPU
    room = max((len(gpus) or os.cpu_count() or 1) // each, 1)
    if gpus and jobs is not None and jobs > room:
        raise ValueError(
            f"--jobs {jobs}: {jobs * each} GPUs with --processes {each}, of which there are {len(gpus)}; "
            f"allowed: --jobs 1 to {room}"
        )
    return Machine(jobs=jobs or room, processes=each, gpus=gpus)


def visible_gpus() -> tuple[str, ...]:
    """Those that nvidia-smi lists, or of them those that CUDA_VISIBLE_DEVICES names."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ()
    count = sum(line.startswith("GPU") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(map(str, range(count)))
    return tuple(name.strip() for name in visible.split(",") if name.strip())[:count]
