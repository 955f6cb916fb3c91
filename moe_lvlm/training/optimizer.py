"""Parameter groups of the optimizer, and the learning rate over a stage."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from moe_lvlm.config.recipe import OptimizerSettings, ScheduleSettings


def parameter_groups(model: nn.Module, *, learning_rate: float, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Trainable parameters in two named groups: matrices with weight decay; biases, norms and other vectors without.

    A stacked expert bias [E, F] is a bias all the same.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        dims = len(getattr(parameter, "ds_shape", parameter.shape))
        is_expert_bias = ".experts.b" in name
        (decay if dims >= 2 and not is_expert_bias else no_decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "lr": learning_rate, "weight_decay": settings.weight_decay},
        {"name": "no_decay", "params": no_decay, "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_at(step: int, *, num_steps: int, peak: float, schedule: ScheduleSettings) -> float:
    """Learning rate of a step, 0 <= step < num_steps.

    Warm-up is linear from `warmup_from`, which a step before the first would have, and reaches the peak at its last step;
    then cosine or linear down to `final_ratio` x peak, which the step after the last one would have.
    """
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(schedule.warmup_ratio * num_steps)
    if step < warmup:
        # so summed that without `warmup_from` it is peak * (step + 1) / warmup to the bit
        return schedule.warmup_from * (warmup - step - 1) / warmup + peak * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    if schedule.kind == "constant":
        ratio = 1.0
    elif schedule.kind == "linear":
        ratio = 1 - progress * (1 - schedule.final_ratio)
    else:
        ratio = schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * ratio
