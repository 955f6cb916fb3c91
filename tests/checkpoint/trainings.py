"""A small model in training by AdamW, and saving it: what the tests of one process share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_lvlm.checkpoint.fragments import LiveTraining, live_model
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.rng import capture_rng
from moe_lvlm.checkpoint.save import save_checkpoint

# What training's own state says after three steps of a second stage.
TRAIN_STATE: dict[str, Any] = {
    "stage": 1, "step": 3, "global_step": 3, "samples": 24, "bad": 0, "tokens": 100, "is_stage_done": False,
    "world_size": 1, "expert_parallel_size": 1, "zero_stage": 0,
}  # fmt: skip


def trained_by_adam(model: nn.Module) -> LiveTraining:
    """A model whose parameters that require a gradient are trained by AdamW."""
    return live_model(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def stepped(seed: int = 0, steps: int = 3, *, inputs: int = 500, width: int = 5) -> LiveTraining:
    """Linear (its bias frozen), batch norm (buffers), linear; after so many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    model.get_parameter("0.bias").requires_grad_(False)
    training = trained_by_adam(model)
    step(training, steps)
    return training


def step(training: LiveTraining, steps: int) -> list[float]:
    """The losses of so many steps on random inputs."""
    assert training.optimizer is not None
    inputs = next(training.model.parameters()).shape[-1]
    losses = []
    for _ in range(steps):
        training.optimizer.zero_grad()
        loss = training.model(torch.randn(6, inputs)).square().mean()
        loss.backward()
        training.optimizer.step()
        losses.append(loss.item())
    return losses


def save_one(directory: Path, name: str, training: LiveTraining, *, state: dict[str, Any], config: Any = None) -> Path:
    """Save as one process."""
    return save_checkpoint(
        directory,
        name,
        training,
        config={"model_type": "x"} if config is None else config,
        state=state,
        rng=capture_rng(),
        ranks=SingleRank(),
        log=print,
    ).path
