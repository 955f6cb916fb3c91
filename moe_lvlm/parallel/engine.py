"""From a built model to a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn


def start_engine(
    model: nn.Module,
    optimizer_groups: list[dict[str, Any]],
    *,
    optimizer_options: dict[str, Any],
    config: dict[str, Any],
) -> Any:
    """The DeepSpeed engine of a model, with torch's AdamW.

    optimizer_groups: parameter groups, each with a `name` and its own options (lr, weight_decay); experts under
    expert parallelism are split off into groups of their own with the same options.
    config: the resolved DeepSpeed dict.
    """
    groups = split_params_into_different_moe_groups_for_optimizer([dict(group) for group in optimizer_groups])
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, **optimizer_options)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine
