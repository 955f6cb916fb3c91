"""One side of a pair of nodes: a process of its own, that `pairs` starts with what it needs as JSON and may kill."""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from moe_lvlm.preflight.allreduce import check_sum, measure
from moe_lvlm.preflight.ending import end_after
from moe_lvlm.preflight.meeting import first_line

RESULT = "result: "
START_LIMIT = 30.0  # seconds to start Python and load torch, before a side's own limit begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """side: 0 for the lower node, which opens the pair's store at `host`; 1 for the other. master, port: the check's
    store, through which side 1 learns the pair's port under `key`. limit: seconds.
    """

    side: int
    host: str
    master: str
    port: int
    key: str
    backend: str
    mib: int
    limit: float

    def command(self) -> list[str]:
        """What starts the process."""
        return [sys.executable, "-m", "moe_lvlm.preflight.pair", json.dumps(asdict(self))]


def main(argument: str) -> None:
    """Print `result: SECONDS` of an all-reduce between the two sides and end with 0, or say why not and end with 1."""
    side = Side(**json.loads(argument))
    end_after(side.limit)  # should whoever started us be stopped
    meeting = _connect(side)
    threading.Thread(target=_watch_other, args=(side, _connect(side)), daemon=True).start()
    try:
        seconds = _test(side, meeting)
    except RuntimeError as error:
        meeting.set(f"{side.key}/failed/{side.side}", first_line(error))
        _end(1, first_line(error))
    _end(0, f"{RESULT}{seconds}")


def _connect(side: Side) -> dist.TCPStore:
    limit = timedelta(seconds=side.limit)
    return dist.TCPStore(side.master, side.port, is_master=False, timeout=limit, wait_for_workers=False)


def _watch_other(side: Side, meeting: dist.TCPStore) -> None:
    """Fail as soon as the other side has, with its reason: here it would look like a silence."""
    failed = f"{side.key}/failed/{1 - side.side}"
    meeting.wait([failed], timedelta(seconds=2 * side.limit))
    _end(1, meeting.get(failed).decode())


def _end(status: int, line: str) -> NoReturn:
    """Not by way of the interpreter's end, where a process group may hang."""
    print(line, flush=True)
    os._exit(status)


def _test(side: Side, meeting: dist.TCPStore) -> float:
    limit = timedelta(seconds=side.limit)
    port = 0 if side.side == 0 else int(meeting.get(side.key))
    store = dist.TCPStore(side.host, port, 2, is_master=side.side == 0, timeout=limit, wait_for_workers=False)
    if side.side == 0:
        meeting.set(side.key, str(store.port))
    device = torch.device("cuda", 0) if side.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        side.backend,
        store=store,
        rank=side.side,
        world_size=2,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    check_sum(device)
    seconds = measure(device, mib=side.mib)
    # Who ends first would cut off what the other still has to receive.
    meeting.set(f"{side.key}/done/{side.side}", "")
    meeting.wait([f"{side.key}/done/{1 - side.side}"], limit)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1])
