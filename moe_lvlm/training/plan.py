"""What each stage of a recipe would train, and all mistakes that can be found before the first one starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlavaProcessor

from moe_lvlm.config.deepspeed import resolve_deepspeed
from moe_lvlm.config.recipe import Recipe, StageSettings
from moe_lvlm.data.mixture import build_dataset
from moe_lvlm.models.build import build_empty
from moe_lvlm.models.processor import num_image_tokens
from moe_lvlm.training.build import stage_config
from moe_lvlm.training.memory import ParameterGroup, parameter_table
from moe_lvlm.training.trainable import select_trainable


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage: its settings, its DeepSpeed dict, its parameters by group."""

    settings: StageSettings
    deepspeed: dict[str, Any]
    groups: list[ParameterGroup]


def plan_stages(recipe: Recipe, *, world_size: int) -> list[StagePlan]:
    """Every stage, its model built on meta tensors.

    Raises:
        ValueError: what `train` would refuse of the model, the parts to train, or the processes.
    """
    plans = []
    for index, stage in enumerate(recipe.stages):
        deepspeed = resolve_deepspeed(recipe, stage, world_size)
        model = build_empty(stage_config(recipe, index))
        select_trainable(model, stage.train)
        plans.append(StagePlan(stage, deepspeed, parameter_table(model)))
    return plans


def check_data(recipe: Recipe, processor: LlavaProcessor) -> None:
    """Open every stage's files of records, so that a missing one shows now and not hours later.

    Raises:
        ValueError: a file or a template that cannot be used. Records are looked at when they are drawn.
    """
    for stage in recipe.stages:
        build_dataset(
            recipe.data,
            stage.mixture or recipe.data.mixture,
            stage.template or recipe.data.template,
            processor,
            num_image_tokens,
            recipe.seed,
        )
