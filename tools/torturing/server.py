"""Forks the ranks of runs from a process that has imported everything: a start takes 0.1 s and not 10.

Requests are lines of JSON on stdin, each answered by a line on stdout:
    {"start": {"command": [...], "world": 2, "output": path, "strike": {...} or null}}  ->  {"pids": [...]}
    {"poll": [pids]}  ->  {"statuses": [...]}: exit statuses, a signal's number being negative, null while they run
The ranks of a run are one process group, whose number is the first one's. When stdin ends, all that still run are
killed: none outlives the program that asked for them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from PIL import Image

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What a run would import when it gets there. DeepSpeed looks at Muon whatever the optimizer is, and that imports
# torch's compiler for seconds.
PRELOADED = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "setuptools",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "moe_lvlm.training.run",
    "torturing.strike",
)
PORTS = range(20000, 32000)  # below those that systems give to outgoing connections


class Ranks:
    """The processes that were forked, and how they ended."""

    def __init__(self) -> None:
        self._statuses: dict[int, int | None] = {}
        self._groups: dict[int, int] = {}

    def fork(self, world: int) -> tuple[int, list[int]]:
        """Fork a run's ranks. Gives (rank, []) in each of them, (-1, pids) here."""
        pids: list[int] = []
        gates: list[int] = []
        for rank in range(world):
            ready, gate = os.pipe()
            pid = os.fork()
            if pid == 0:
                for other in (*gates, gate):
                    os.close(other)
                os.read(ready, 1)  # until all of them exist, and are one group
                os.close(ready)
                return rank, []
            os.close(ready)
            gates.append(gate)
            group = pids[0] if pids else pid
            os.setpgid(pid, group)
            pids.append(pid)
            self._statuses[pid] = None
            self._groups[pid] = group
        for gate in gates:
            os.close(gate)
        return -1, pids

    def poll(self, pids: list[int]) -> list[int | None]:
        for pid in pids:
            if self._statuses[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._statuses[pid] = os.waitstatus_to_exitcode(status)
        return [self._statuses[pid] for pid in pids]

    def kill(self) -> None:
        for group in {self._groups[pid] for pid, status in self._statuses.items() if status is None}:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def serve() -> tuple[int, dict[str, Any]] | None:
    """Answer until stdin ends; in a rank return its number and what it was asked for."""
    ranks = Ranks()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            _reply(statuses=ranks.poll(request["poll"]))
            continue
        wanted = request["start"]
        port = _free_port()
        rank, pids = ranks.fork(wanted["world"])
        if rank >= 0:
            _become(rank, port, wanted)
            return rank, wanted
        _reply(pids=pids)
    ranks.kill()
    return None


def _become(rank: int, port: int, wanted: dict[str, Any]) -> None:
    values = (str(rank), str(wanted["world"]), str(rank), "127.0.0.1", str(port))
    os.environ.update(zip(LAUNCHER_VARIABLES, values, strict=True))
    output = os.open(wanted["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)


def _free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _reply(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def main() -> int:
    """Serve; in a rank be `moe-lvlm`."""
    for module in PRELOADED:
        importlib.import_module(module)
    Image.init()  # loads the plugins of all formats
    # a collection in a rank would touch, and so copy, everything that was imported
    gc.freeze()
    _reply(ready=True)
    asked = serve()
    if asked is None:
        return 0
    from moe_lvlm.cli import main as moe_lvlm
    from torturing.strike import arm

    rank, wanted = asked
    if wanted["strike"] is not None:
        arm(wanted["strike"], rank)
    return moe_lvlm(wanted["command"])


if __name__ == "__main__":
    sys.exit(main())
