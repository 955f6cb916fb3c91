"""What processes of the training tests do besides `moe-lvlm train`."""

from __future__ import annotations

import os
import signal

import moe_lvlm
from moe_lvlm import cli


def train_and_die(number: str, *command: str) -> None:
    """`moe-lvlm` that kills all processes of the run at the first one's `number`-th fsync, before it is done."""
    left = int(number) if os.environ["RANK"] == "0" else -1
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.killpg(os.getpgid(0), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted  # type: ignore[assignment]
    raise SystemExit(cli.main(list(command)))


def train_several(*recipes: str) -> None:
    """Train one recipe after the other in this process, through the Python API."""
    for path in recipes:
        print(moe_lvlm.train(moe_lvlm.load_recipe(path)))
