"""A stage's data, opened the one way that the trainer, its checks and the benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.mixture import MixtureDataset, build_dataset, needed_data
from moe_lvlm.data.order import StepOrder
from moe_lvlm.models.processor import Processor, num_image_tokens
from moe_lvlm.training.build import stage_config


@dataclass(frozen=True, slots=True)
class StageData:
    """What is drawn, how batches are made of it, and in which order."""

    recipe: Recipe
    dataset: MixtureDataset
    collator: Collator
    order: StepOrder


def open_stage_data(recipe: Recipe, stage: int, processor: Processor) -> StageData:
    """Open the files of records of a stage (its place, from 0).

    Raises:
        ValueError: a file, a template or a feature cache that cannot be used.
    """
    settings, config = recipe.stages[stage], stage_config(recipe, stage)
    seed = recipe.seed * 1000 + stage
    dataset, collator = build_dataset(
        needed_data(recipe.data, config.moe_config, config.adapter_settings),
        settings.mixture or recipe.data.mixture,
        settings.template or recipe.data.template,
        processor,
        num_image_tokens,
        seed,
        answers_apart=config.is_answer_apart,
    )
    order = StepOrder(
        seed=seed, epoch_size=len(dataset), micro_batch=settings.micro_batch, global_batch=settings.global_batch
    )
    return StageData(recipe, dataset, collator, order)
