"""What each rank does in the check of the fabric, and what is asked of it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_lvlm.preflight.allreduce import check_device, check_sum, measure
from moe_lvlm.preflight.host import node_name, versions
from moe_lvlm.preflight.meeting import LATER, first_line, put
from moe_lvlm.preflight.place import Place

# What a rank may be at.
START, DEVICE, GROUP, SUM, SPEED = "the search for GPUs", "the GPU test", "init", "the all-reduce", "the timing"


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricDemands:
    """mib: size of the all-reduce that is timed. limit: seconds to meet, and again for the tests. min_gigabytes: bus
    bandwidth asked for, per second; None: any. needs_cuda: a rank without a GPU is bad; else gloo serves where no rank
    has one.
    """

    mib: int
    limit: float
    min_gigabytes: float | None = None
    needs_cuda: bool = False


def name_of(place: Place) -> str:
    """The name of our node."""
    return place.nodes[place.rank // place.local_size] if place.nodes else node_name()


class Work(threading.Thread):
    """This rank's part: who we are, then the tests with the backend that rank 0 names. It all goes to the store."""

    def __init__(self, place: Place, demands: FabricDemands, store: dist.TCPStore) -> None:
        super().__init__(daemon=True)
        self.at = START
        self._place = place
        self._demands = demands
        self._store = store

    def run(self) -> None:
        rank = self._place.rank
        try:
            put(self._store, "here", rank, _introduction(self._place))
            put(self._store, "result", rank, {"seconds": self._test()})
        except (RuntimeError, ValueError) as error:
            put(self._store, "result", rank, {"failure": first_line(error), "at": self.at})
            self._store.set("failure", "")

    def _test(self) -> float:
        """Seconds of an all-reduce."""
        place, limit = self._place, self._demands.limit
        self._store.wait(["backend"], timedelta(seconds=limit + 2 * LATER))
        backend = self._store.get("backend").decode()
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", place.local_rank)
            self.at = DEVICE
            check_device(device)
        self.at = GROUP
        # The group waits longer than rank 0 does: rank 0 is to say who is missing, before the backend gives up.
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", self._store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=limit + 4 * LATER),
            device_id=device if device.type == "cuda" else None,
        )
        self.at = SUM
        check_sum(device)
        self.at = SPEED
        return measure(device, mib=self._demands.mib)


def _introduction(place: Place) -> dict[str, Any]:
    # As training decides where its model lives.
    num_gpus = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    found = {name: version or "none" for name, version in versions().items()}
    return {"node": name_of(place), "versions": found, "gpus": num_gpus, "local_rank": place.local_rank}
