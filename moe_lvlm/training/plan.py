"""What each stage of a recipe would train, and all mistakes that can be found before the first one starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_lvlm.adapters.start import check_centres
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.config.deepspeed import resolve_deepspeed
from moe_lvlm.config.moe import ClusterRouterSettings, MoEConfig
from moe_lvlm.config.recipe import Recipe, StageSettings
from moe_lvlm.data.clusters import InstructionClusters
from moe_lvlm.data.errors import BadRecordError
from moe_lvlm.data.mixture import MixtureDataset
from moe_lvlm.models.build import build_empty
from moe_lvlm.models.clusters import check_centres as check_router_centres
from moe_lvlm.models.instructblip_config import VLMConfig
from moe_lvlm.models.packed_attention import check_family
from moe_lvlm.models.processor import Processor
from moe_lvlm.moe.checkpointing import choose_layers
from moe_lvlm.training.build import stage_config
from moe_lvlm.training.data import open_stage_data
from moe_lvlm.training.features import check_feature_cache, check_stage_tower
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
            without which a router cannot decide; a stage that trains the tower beside a feature cache.
    """
    plans = []
    for index, stage in enumerate(recipe.stages):
        deepspeed = resolve_deepspeed(recipe, stage, world_size)
        config = stage_config(recipe, index)
        _check_batching(recipe, config)
        if config.moe_config is not None:
            _check_facts(recipe, config.moe_config)
        _check_adapter_facts(recipe, index, config.adapter_settings)
        model = build_empty(config)
        if recipe.train.gradient_checkpointing is not True and recipe.train.gradient_checkpointing:
            choose_layers(model.language_layers(), recipe.train.gradient_checkpointing)
        select_trainable(model, stage.train)
        if recipe.data.feature_cache is not None:
            check_stage_tower(stage, model)
        plans.append(StagePlan(stage, deepspeed, parameter_table(model)))
    return plans


def check_data(recipe: Recipe, processor: Processor) -> None:
    """Open every stage's files of records, so that a missing one shows now and not hours later.

    Raises:
        ValueError: a file or a template that cannot be used, a table of clusters that the routers cannot take, or an
            instruction that it does not hold where its encoder cannot be loaded, a feature cache of another tower.
            Records are looked at when they are drawn, but for their instructions if routers go by clusters.
    """
    check_feature_cache(recipe, processor)
    for index in range(len(recipe.stages)):
        config = stage_config(recipe, index)
        moe, adapter = config.moe_config, config.adapter_settings
        dataset = open_stage_data(recipe, index, processor).dataset
        clusters = dataset.builder.clusters
        if clusters is None:
            continue
        if moe is not None and isinstance(moe.router, ClusterRouterSettings):
            check_router_centres(clusters.table.num_clusters, clusters.table.width, moe.router)
        if isinstance(adapter, MoCLESettings):
            check_centres(clusters.table.num_clusters, clusters.table.width, adapter)
        if (moe is not None and moe.router.kind == "cluster") or _is_gated_by(adapter, "cluster"):
            _check_instructions(dataset, clusters)


def _check_batching(recipe: Recipe, config: VLMConfig) -> None:
    """Whether the language model takes the batches."""
    if recipe.data.batching != "packed":
        return
    if config.is_answer_apart:
        raise ValueError(
            f"data.batching: packed, but the language model ({config.text_config.model_type}) is an encoder-decoder, which "
            "reads prompt and answer apart; allowed: padded"
        )
    check_family(config.text_config)


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


def _is_gated_by(adapter: LoRASettings | MoCLESettings | None, gating: str) -> bool:
    return isinstance(adapter, MoCLESettings) and adapter.gating == gating


def _check_adapter_facts(recipe: Recipe, stage: int, adapter: LoRASettings | MoCLESettings | None) -> None:
    """Whether the recipe gives what the gates go by."""
    if _is_gated_by(adapter, "cluster") and recipe.data.clusters is None:
        raise ValueError(
            "model.adapter.gating: cluster, but data.clusters is not given; allowed: a table that tools/fit_clusters.py "
            "wrote, or another gating"
        )
    if _is_gated_by(adapter, "dataset"):
        assert isinstance(adapter, MoCLESettings)
        mixture = recipe.stages[stage].mixture or recipe.data.mixture
        if len(mixture) > adapter.num_clusters:
            raise ValueError(
                f"model.adapter.num_clusters: {adapter.num_clusters}, but stage {recipe.stages[stage].name} mixes "
                f"{len(mixture)} datasets, each with a row of its own; allowed: {len(mixture)} or more"
            )


def _check_instructions(dataset: MixtureDataset, clusters: InstructionClusters) -> None:
    """Whether the table holds every instruction, or its encoder can be loaded for the others."""
    for source in dataset.sources:
        for index in range(len(source)):
            try:
                instructions = source.instructions(index)
            except BadRecordError:  # counted when it is drawn
                continue
            for instruction in instructions:
                if clusters.table.find(instruction) is None:
                    clusters.cluster(instruction)  # loads the encoder, or says that it cannot be
                    return
