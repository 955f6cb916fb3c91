"""Joining the group of processes that train together."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# torch's own for gloo
_TIMEOUT = timedelta(minutes=30)
# Time to write stacks and to end, before the collectives of a hanging run end it in their own way.
_AFTER_HANG = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class World:
    """Who we are among the processes. device: where this rank's model lives."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0


def group_timeout(hang_timeout: float) -> timedelta:
    """For how long a collective may wait in a run whose watchdog has that limit (seconds, 0: none).

    Where it has passed, gloo raises in the process that waits, and NCCL ends the process: no rank's stacks are written.
    """
    return max(_TIMEOUT, timedelta(seconds=hang_timeout) + _AFTER_HANG)


def set_group_timeouts(timeout: timedelta) -> None:
    """Let all groups that this process is in have that timeout. DeepSpeed makes groups with torch's default, which for
    NCCL is 10 minutes whatever the world's own is."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def host_name() -> str:
    """This machine, by the name that SLURM has for it, if it runs there."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def batch_job() -> dict[str, Any]:
    """`job`, the id of the SLURM job that this process is part of, and `attempt`, which of a run's starts this is (from
    1); what is not known is left out.

    Raises:
        ValueError: MOE_LVLM_ATTEMPT is no whole number above 0.
    """
    facts: dict[str, Any] = {}
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        facts["job"] = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    elif job := os.environ.get("SLURM_JOB_ID"):
        facts["job"] = job
    if attempt := os.environ.get("MOE_LVLM_ATTEMPT"):
        if not attempt.isdecimal() or int(attempt) < 1:
            raise ValueError(f"MOE_LVLM_ATTEMPT={attempt!r}; allowed: a whole number above 0")
        facts["attempt"] = int(attempt)
    return facts


def join_world(*, timeout: timedelta = _TIMEOUT) -> World:
    """Join the processes that a launcher started (RANK, WORLD_SIZE, MASTER_ADDR, ... in the environment), or make a
    world of one; gloo on CPU, NCCL on CUDA. timeout: of collectives (`group_timeout`).

    Raises:
        ValueError: some of a launcher's variables are set and others are missing.
    """
    _set_environment()
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # The shared-memory extension would be compiled for 40 s at the first start on CPU; gloo serves without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Where torch's group exists already this only tells DeepSpeed of it.
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def leave_world() -> None:
    """Leave what `join_world` joined, at the end of a process that ends well, where NCCL would warn of a group that is
    left open. gloo says nothing, and a rank that left early would break what others still do."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()


def _set_environment() -> None:
    """The launcher's variables; without a launcher those of a world of one."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing and len(missing) < len(needed):
        raise ValueError(f"the launcher set some of {', '.join(needed)} but not {', '.join(missing)}")
    if missing:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
