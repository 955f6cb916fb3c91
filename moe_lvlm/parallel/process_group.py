"""Joining the group of processes that train together."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


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


def join_world(*, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the processes that a launcher started (RANK, WORLD_SIZE, MASTER_ADDR, ... in the environment), or make a
    world of one; gloo on CPU, NCCL on CUDA.

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
