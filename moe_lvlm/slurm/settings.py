"""What a job asks of a cluster, and what a site always asks. Values go into a script, so they are checked for its sake."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from moe_lvlm.config.base import Settings

# Neither spaces nor quotes: SLURM has no such names, and nothing of them can become shell code.
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,:@+=&|*()\[\]-]*$")]
JobName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\r\n]+$")]
_VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
# Options that the job's own working depends on.
_OURS = (
    "array", "chdir", "cpus-per-task", "gpus-per-node", "job-name", "kill-on-invalid-dep", "no-requeue", "nodes",
    "ntasks", "ntasks-per-node", "open-mode", "output", "error", "requeue", "signal", "time", "wrap",
)  # fmt: skip


class PreflightSettings(Settings):
    """What each node must have before a job trains (docs/slurm.md).

    min_gpu_memory, min_memory, min_disk: GiB; of each GPU, of the host, free in the run's folder. min_bandwidth: GB/s
    of the all-reduce over all ranks (bus bandwidth). command: a shell line of the site's own; a status other than 0
    means a bad node. timeout: seconds for each of the checks.
    """

    enabled: bool = True
    min_gpu_memory: float | None = Field(default=None, gt=0)
    min_memory: float | None = Field(default=None, gt=0)
    min_disk: float = Field(default=5.0, ge=0)
    min_bandwidth: float | None = Field(default=None, gt=0)
    command: Line | None = None
    timeout: int = Field(default=120, ge=10, le=3600)


class ContainerSettings(Settings):
    """An image to train in; without `image`, the environment that submits is the one that trains.

    runtime: `pyxis` (srun's --container-image, enroot) or `apptainer`. mounts: `SOURCE:TARGET`; the working directory
    and the run's folder are always there, at the same paths. python: the interpreter inside the image, with moe_lvlm.
    """

    image: Line | None = None
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[Line, ...] = ()
    python: Line = "python3"

    @field_validator("mounts")
    @classmethod
    def _check_mounts(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            if "," in mount or not re.fullmatch(r"/[^:]*(:/[^:]*(:[a-z]+)?)?", mount):
                raise ValueError(f"{mount!r}; allowed: /SOURCE, /SOURCE:/TARGET or /SOURCE:/TARGET:ro, without commas")
        return mounts


class JobSettings(Settings):
    """A job: what it asks of SLURM, and how it behaves. A site's file holds the same keys.

    gpus_per_node: one process a GPU; 0 trains on CPUs, with `processes_per_node` processes.
    cpus_per_process: None is a core for the process and one for each of the recipe's data workers.
    memory: of a node, as SLURM writes it (`0` is all of it). time: as SLURM writes it; None is the partition's.
    stop_signal, stop_before: the signal that comes so many seconds before the end, upon which the run saves and is
        queued again. It must leave room for a step and a save. NCCL's plugins may take USR1: then USR2.
    max_attempts: so many attempts in a row without a new checkpoint, and the job gives up.
    exclude: nodes that are not to be used. sbatch: further options, such as `--mail-type=FAIL`.
    setup: shell lines before anything else, such as `module load cuda/12.8`. env: variables for every process.
    """

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=8, ge=0)
    gpu_type: Word | None = None
    processes_per_node: int | None = Field(default=None, ge=1)
    cpus_per_process: int | None = Field(default=None, ge=1)
    memory: Annotated[str, StringConstraints(pattern=r"^[0-9]+[KMGT]?$")] | None = None
    time: str | None = None
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    exclude: Word | None = None
    exclusive: bool = False
    dependency: Word | None = None
    job_name: JobName | None = None
    sbatch: tuple[Line, ...] = ()
    setup: tuple[Line, ...] = ()
    env: Mapping[str, str] = {}
    stop_signal: Literal["USR1", "USR2"] = "USR1"
    stop_before: int = Field(default=300, ge=1, le=65535)
    max_attempts: int = Field(default=3, ge=1)
    preflight: PreflightSettings = PreflightSettings()
    container: ContainerSettings = ContainerSettings()

    @property
    def num_processes_per_node(self) -> int:
        """Processes on each node: one a GPU, or what was asked for."""
        return self.processes_per_node or max(self.gpus_per_node, 1)

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.num_processes_per_node

    @field_validator("time")
    @classmethod
    def _check_time(cls, time: str | None) -> str | None:
        if time is not None:
            seconds_of(time)
        return time

    @field_validator("sbatch")
    @classmethod
    def _check_sbatch(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.startswith("--"):
                raise ValueError(f"{option!r}; allowed: a long option, such as --mail-type=FAIL")
            name = re.split(r"[=\s]", option.removeprefix("--"))[0]
            if name in _OURS:
                raise ValueError(f"{option!r}: --{name} is set by the job itself; allowed: other options of sbatch")
        return options

    @field_validator("env")
    @classmethod
    def _check_names(cls, env: Mapping[str, str]) -> Mapping[str, str]:
        for name in env:
            if not _VARIABLE.match(name):
                raise ValueError(f"{name!r}; allowed: names of environment variables")
        return env

    @model_validator(mode="after")
    def _check_stop(self) -> JobSettings:
        if self.time is not None and seconds_of(self.time) <= self.stop_before:
            raise ValueError(
                f"stop_before: {self.stop_before} seconds before the end, and the time limit is {self.time} "
                f"({seconds_of(self.time)} s); allowed: less than the time limit"
            )
        return self

    @model_validator(mode="after")
    def _check_processes(self) -> JobSettings:
        asked, gpus = self.processes_per_node, self.gpus_per_node
        if gpus and asked is not None and asked != gpus:
            raise ValueError(
                f"processes_per_node: {asked} beside gpus_per_node: {gpus}; allowed: as many as GPUs, or none given"
            )
        return self


_TIME = re.compile(
    r"^(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?|(?P<clock>\d+(?::\d+){0,2}))$"
)


def seconds_of(time: str) -> int:
    """A time limit of SLURM's in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises:
        ValueError: none of these.
    """
    match = _TIME.match(time)
    if match is None:
        raise ValueError(f"{time!r}; allowed: 90 (minutes), 12:00:00 (hours) or 2-00:00:00 (days)")
    if match["days"] is not None:
        parts = [int(match[name] or 0) for name in ("hours", "minutes", "seconds")]
        return int(match["days"]) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]
    clock = [int(part) for part in match["clock"].split(":")]
    weights = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(clock)]
    return sum(value * weight for value, weight in zip(clock, weights, strict=True))
