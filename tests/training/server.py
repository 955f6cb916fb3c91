"""Forks the processes of runs. It has imported everything once, so that a run starts in 0.1 s and not in 8.

A line on stdin asks for a run, the next line on stdout says its processes, the one after it their exit statuses:
    {"command": [...], "world": 2, "environment": {...}, "output": path}  ->  {"pids": [...]}  ->  {"statuses": [...]}
command: arguments of `moe-lvlm`, or a function of `tests.training.children` and its arguments. world: processes as a
launcher would start them; 0 is one process without a launcher. All processes of a run are one process group.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
from typing import Any

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What a run would import when it gets there. `torch._dynamo`: torch's optimizers load it at their first step. DeepSpeed
# looks at Muon whatever the optimizer is, and with it imports torch's compiler: 6 s of every process's start.
PRELOADED = (
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "setuptools",
    "PIL.PngImagePlugin",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "transformers.models.instructblip.modeling_instructblip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "moe_lvlm.training.run",
    "tests.training.children",
)


def serve() -> list[str] | None:
    """Answer requests until stdin ends; in a process of a run return its command."""
    for line in sys.stdin:
        request = json.loads(line)
        port = _free_port()
        pids: list[int] = []
        for rank in range(max(request["world"], 1)):
            # each waits until the group and all its members exist
            ready, go = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(go)
                os.read(ready, 1)
                _become(request, rank, port)
                command: list[str] = request["command"]
                return command
            os.close(ready)
            os.setpgid(pid, pids[0] if pids else pid)
            pids.append(pid)
            os.close(go)
        _reply(pids=pids)
        _reply(statuses=[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    return None


def _become(request: dict[str, Any], rank: int, port: int) -> None:
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    if request["world"]:
        values = (str(rank), str(request["world"]), str(rank), "127.0.0.1", str(port))
        os.environ.update(zip(LAUNCHER_VARIABLES, values, strict=True))
    os.environ.update(request["environment"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _reply(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def run_command(command: list[str]) -> int:
    """What a process of a run does; its exit status."""
    from moe_lvlm.cli import main
    from tests.training import children

    function = getattr(children, command[0], None)
    if function is not None:
        function(*command[1:])
        return 0
    return main(command)


if __name__ == "__main__":
    for module in PRELOADED:
        importlib.import_module(module)
    # a collection in a process of a run would touch, and so copy, everything that was imported
    gc.freeze()
    wanted = serve()
    if wanted is not None:
        sys.exit(run_command(wanted))
