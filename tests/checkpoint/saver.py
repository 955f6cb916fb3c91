"""The process that the kill test kills."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from moe_lvlm.checkpoint.fragments import live_model
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.save import save_checkpoint


def save_forever(folder: Path, first: int, reports: Connection) -> None:
    """Save step after step, all weights being the step's number; send each step once its save has returned."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    training = live_model(model)  # an optimizer would cost seconds of imports in every round
    for step in range(first, 10**6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        # every third save replaces a folder that is there, or soon will be
        name = f"s-{step % 4}" if step % 3 == 0 else f"s-{step}"
        save_checkpoint(
            folder,
            name,
            training,
            config={},
            state={"global_step": step},
            rng={},
            ranks=SingleRank(),
            log=print,
            keep_last=2,
        )
        reports.send(step)
