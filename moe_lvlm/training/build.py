"""The model with which a stage begins, on this rank."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_lvlm.adapters import adapter_parameters
from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.config.connector import QFormerConnectorSettings
from moe_lvlm.config.recipe import ModelSettings, Recipe
from moe_lvlm.data.mixture import open_clusters
from moe_lvlm.models.adapt import attach_adapter, start_adapter
from moe_lvlm.models.build import (
    VLM,
    build_config,
    build_dense,
    build_empty,
    choose_attention,
    config_of,
    is_plain_llava,
    load_plain_llava,
    open_weights,
)
from moe_lvlm.models.clusters import start_clusters
from moe_lvlm.models.config import MoELlavaConfig, with_fields
from moe_lvlm.models.instructblip_config import VLMConfig
from moe_lvlm.models.load import find_model, read_processor
from moe_lvlm.models.processor import Processor
from moe_lvlm.models.qformer import with_connector
from moe_lvlm.models.upcycle import upcycle
from moe_lvlm.models.weights import load_weights
from moe_lvlm.parallel.expert_parallel import bind_expert_parallel
from moe_lvlm.training.trainable import select_trainable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def is_sparse_at(recipe: Recipe, stage: int) -> bool:
    """Whether the model has been upcycled when this stage trains."""
    return any(one.upcycle for one in recipe.stages[: stage + 1])


def build_stage_model(
    recipe: Recipe, stage: int, checkpoint: Path | None, *, zero_stage: int, device: torch.device
) -> VLM:
    """The model of a stage, what it trains chosen, with this rank's share of the experts.

    checkpoint: of the stage before, or of this one when it is resumed; None at the first stage. From a checkpoint or a
    whole model's folder the model is built on meta tensors and filled by ranges, experts cut from the dense FFNs where
    the stage upcycles, and out of a plain Q-Former's where the connector is a Q-MoE; from parts, or from transformers'
    own LLaVA, it is built whole first.
    """
    folder = checkpoint
    if folder is None and recipe.model.from_pretrained is not None:
        folder, _ = find_model(recipe.model.from_pretrained)
    dtype = DTYPES[recipe.train.precision]
    size = recipe.parallel.expert_parallel_size
    if folder is None or is_plain_llava(folder):
        if folder is None:
            model, _ = build_dense(recipe.model, seed=recipe.seed, dtype=dtype)
        else:
            model = load_plain_llava(folder, dtype=dtype, attention=choose_attention(recipe.model.attention))
        if is_sparse_at(recipe, stage):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(router_seed(recipe))
                upcycle(model, recipe.moe)
            _start_clusters(model, recipe)
        if _is_adapted_at(recipe, stage):
            _attach_adapter(model, recipe)
            _start_adapter(model, recipe)
        select_trainable(model, recipe.stages[stage].train)
        bind_expert_parallel(model, size, zero_stage=zero_stage)
        return model.to(device)
    config = config_of(folder) if checkpoint is not None else _whole_config(recipe.model)
    begins = not _is_of_stage(recipe, stage, checkpoint)
    if begins:
        config = _begin_upcycled(recipe, stage, config)
    config._attn_implementation = choose_attention(recipe.model.attention)
    model = build_empty(config)
    is_new = begins and _is_adapted_at(recipe, stage)
    if is_new:
        _attach_adapter(model, recipe)
    # What is trained decides how experts are spread, and adapters on experts are spread with them.
    select_trainable(model, recipe.stages[stage].train)
    bind_expert_parallel(model, size, zero_stage=zero_stage)
    source = open_weights(folder, text_from=_text_from(recipe.model))
    new = adapter_parameters(model) if is_new else ()
    load_weights(model, source, device=device, dtype=dtype, router_seed=router_seed(recipe), new=new)
    if begins and recipe.stages[stage].upcycle:
        _start_clusters(model, recipe)
    if is_new:
        _start_adapter(model, recipe)
    return model


def stage_config(recipe: Recipe, stage: int) -> VLMConfig:
    """The configuration of a stage's model, without reading a weight."""
    config = build_config(recipe.model)[0] if recipe.model.from_pretrained is None else _whole_config(recipe.model)
    for index in range(stage + 1):
        config = _begin_stage(recipe, index, config)
    return config


def run_processor(recipe: Recipe) -> Processor:
    """The processor of the run, the same in all stages."""
    if recipe.model.from_pretrained is None:
        return build_config(recipe.model)[1]
    connector = recipe.model.connector
    _whole_config(recipe.model)  # a model that cannot serve says why before its processor is missed
    settings = connector if isinstance(connector, QFormerConnectorSettings) else None
    return read_processor(find_model(recipe.model.from_pretrained)[1], settings)


def _whole_config(settings: ModelSettings) -> VLMConfig:
    """The configuration of the model in the folder `from_pretrained`, with the recipe's connector."""
    assert settings.from_pretrained is not None
    config = config_of(find_model(settings.from_pretrained)[0], text_from=_text_from(settings))
    return with_connector(config, settings)


def _text_from(settings: ModelSettings) -> str | None:
    return settings.connector.text_from if isinstance(settings.connector, QFormerConnectorSettings) else None


def router_seed(recipe: Recipe) -> int:
    """Where new routers are drawn from; not what projectors are drawn from."""
    return recipe.seed + 1


def adapter_seed(recipe: Recipe) -> int:
    """Where new adapters are drawn from."""
    return recipe.seed + 2


def _start_clusters(model: VLM, recipe: Recipe) -> None:
    """Give new cluster routers the centres of the recipe's table. The plan has refused a recipe without one."""
    if recipe.moe.router.kind == "cluster":
        table = open_clusters(recipe.data)
        assert table is not None, "router cluster without data.clusters"
        start_clusters(model, torch.from_numpy(table.centres_KW))


def _is_adapted_at(recipe: Recipe, stage: int) -> bool:
    """Whether the stage puts adapters into the model that it starts from."""
    return recipe.model.adapter is not None and recipe.stages[stage].adapt


def _attach_adapter(model: VLM, recipe: Recipe) -> None:
    assert recipe.model.adapter is not None
    attach_adapter(model, recipe.model.adapter)


def _start_adapter(model: VLM, recipe: Recipe) -> None:
    """Draw the adapters; gates by cluster, and by dataset where the table is one by dataset, begin at its centres."""
    settings = recipe.model.adapter
    assert settings is not None
    is_gated_by_table = isinstance(settings, MoCLESettings) and settings.reads_table
    table = open_clusters(recipe.data) if is_gated_by_table else None
    centres_KG = None if table is None else torch.from_numpy(table.centres_KW)
    start_adapter(model, settings, seed=adapter_seed(recipe), centres_KG=centres_KG)


def _is_of_stage(recipe: Recipe, stage: int, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.name.rpartition("-")[0] == recipe.stages[stage].name


def _begin_stage(recipe: Recipe, stage: int, config: VLMConfig) -> VLMConfig:
    """The configuration with which a stage trains, from that of the model it starts from."""
    config = _begin_upcycled(recipe, stage, config)
    if not recipe.stages[stage].adapt:
        return config
    assert recipe.model.adapter is not None, "the recipe has been checked"
    if config.adapter is not None:
        raise ValueError(
            f"stage {recipe.stages[stage].name}: adapt: true, but the model it starts from has adapters already"
        )
    return with_fields(config, adapter=recipe.model.adapter.model_dump(mode="json"))


def _begin_upcycled(recipe: Recipe, stage: int, config: VLMConfig) -> VLMConfig:
    """The same but for new adapters, which the model gets when its weights are there."""
    if not recipe.stages[stage].upcycle:
        return config
    if not isinstance(config, MoELlavaConfig):
        raise ValueError(
            f"stage {recipe.stages[stage].name}: upcycle: true, which makes a language model sparse; allowed in LLaVA only, "
            f"this is {config.model_type}"
        )
    if config.moe is not None:
        raise ValueError(
            f"stage {recipe.stages[stage].name}: upcycle: true, but the model it starts from is sparse already"
        )
    return config.with_moe(recipe.moe)
