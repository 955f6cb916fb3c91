"""What each stage of a recipe would train, and all mistakes that can be found before the first one starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_lvlm.config.deepspeed import resolve_deepspeed
from moe_lvlm.config.moe import ClusterRouterSettings, MoEConfig
from moe_lvlm.config.recipe import Recipe, StageSettings
from moe_lvlm.data.errors import BadRecordError
from moe_lvlm.data.instructions import first_instruction
from moe_lvlm.data.mixture import MixtureDataset, build_dataset, needed_data
from moe_lvlm.models.build import build_empty
from moe_lvlm.models.clusters import check_centres
from moe_lvlm.models.processor import Processor, num_image_tokens
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
        ValueError: what `train` would refuse of the model, the parts to train, or the processes, and data settings
            without which a router cannot decide.
    """
    plans = []
    for index, stage in enumerate(recipe.stages):
        deepspeed = resolve_deepspeed(recipe, stage, world_size)
        config = stage_config(recipe, index)
        if config.moe_config is not None:
            _check_facts(recipe, config.moe_config)
        model = build_empty(config)
        select_trainable(model, stage.train)
        plans.append(StagePlan(stage, deepspeed, parameter_table(model)))
    return plans


def check_data(recipe: Recipe, processor: Processor) -> None:
    """Open every stage's files of records, so that a missing one shows now and not hours later.

    Raises:
        ValueError: a file or a template that cannot be used, a table of clusters that the routers cannot take, or an
            instruction that it does not hold where its encoder cannot be loaded. Records are looked at when they are
            drawn, but for their instructions if routers go by clusters.
    """
    for index, stage in enumerate(recipe.stages):
        config = stage_config(recipe, index)
        moe = config.moe_config
        dataset, _ = build_dataset(
            needed_data(recipe.data, moe),
            stage.mixture or recipe.data.mixture,
            stage.template or recipe.data.template,
            processor,
            num_image_tokens,
            recipe.seed,
            answers_apart=config.is_answer_apart,
        )
        if moe is not None and isinstance(moe.router, ClusterRouterSettings):
            _check_clusters(dataset, moe.router)


def _check_facts(recipe: Recipe, moe: MoEConfig) -> None:
    """Whether the recipe gives what the router goes by."""
    data, attention = recipe.data, recipe.model.attention
    if moe.needs_attention_weights and attention != "eager":
        raise ValueError(
            f"model.attention: {attention}; moe.router.eea_select: instruction_aware needs attention weights, which only "
            "eager gives; allowed: eager"
        )
    if moe.router.kind == "cluster" and data.clusters is None:
        raise ValueError(
            "moe.router.kind: cluster, but data.clusters is not given; allowed: a table that tools/fit_clusters.py wrote"
        )
    if moe.router.kind == "task":
        if not data.task_types:
            raise ValueError("moe.router.kind: task, but data.task_types is empty; allowed: rules that label samples")
        for place, rule in enumerate(data.task_types):
            if rule.label >= moe.num_experts:
                raise ValueError(
                    f"data.task_types.{place}.label: {rule.label}; allowed: 0 to {moe.num_experts - 1}, one an expert "
                    "(moe.num_experts)"
                )


def _check_clusters(dataset: MixtureDataset, router: ClusterRouterSettings) -> None:
    clusters = dataset.builder.clusters
    assert clusters is not None
    check_centres(clusters.table.num_clusters, clusters.table.width, router)
    for source in dataset.sources:
        for index in range(len(source)):
            try:
                instruction = first_instruction(source.record(index).turns)
            except BadRecordError:  # counted when it is drawn
                continue
            if clusters.table.find(instruction) is None:
                clusters.cluster(instruction)  # loads the encoder, or says that it cannot be
                return
