"""A Q-Former connector for a model made of parts: its configuration, and itself."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, InstructBlipQFormerConfig, InstructBlipQFormerModel

from moe_lvlm.config.connector import MLPConnectorSettings, QFormerConnectorSettings, QMoEConnectorSettings
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.connectors.connector import QFormerConnector
from moe_lvlm.connectors.upcycle import upcycle_qformer
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.blip import blip_config, is_blip, open_blip
from moe_lvlm.models.config import MoELlavaConfig, with_fields
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig, VLMConfig
from moe_lvlm.models.weights import fill_from

NUM_QUERIES = 32


def qformer_fields(settings: QFormerConnectorSettings, *, vision_width: int) -> dict[str, Any]:
    """What `MoELlavaConfig` says of a Q-Former: qformer, num_query_tokens, experts; reads no weight.

    Raises:
        ValueError: keys or a folder that cannot serve.
    """
    assert settings.qformer is not None
    num_queries = settings.num_queries or NUM_QUERIES
    if settings.qformer.from_pretrained is not None:
        source = _source_config(settings)
        fields = source.qformer_config.to_dict()
        if fields["encoder_hidden_size"] != vision_width:
            raise ValueError(
                f"model.connector.qformer: {settings.qformer.from_pretrained} attends to features {fields['encoder_hidden_size']} "
                f"wide, and model.vision_tower's are {vision_width} wide; allowed: a Q-Former for that width, or a new one "
                "(from_config)"
            )
        if settings.num_queries not in (None, source.num_query_tokens):
            raise ValueError(
                f"model.connector.num_queries: {settings.num_queries}; {settings.qformer.from_pretrained} has "
                f"{source.num_query_tokens}; allowed: that, or null"
            )
        num_queries = source.num_query_tokens
    else:
        given = dict(settings.qformer.from_config or {})
        if given.pop("model_type", InstructBlipQFormerConfig.model_type) != InstructBlipQFormerConfig.model_type:
            raise ValueError(
                f"model.connector.qformer.from_config.model_type: allowed: {InstructBlipQFormerConfig.model_type}"
            )
        known = InstructBlipQFormerConfig().to_dict()
        if unknown := sorted(given.keys() - known.keys()):
            raise ValueError(
                f"model.connector.qformer.from_config: {', '.join(unknown)}; allowed: keys of InstructBlipQFormerConfig"
            )
        fields = InstructBlipQFormerConfig(**given, encoder_hidden_size=vision_width).to_dict()
    experts = settings.experts if isinstance(settings, QMoEConnectorSettings) else None
    return {
        "qformer": with_dropout(fields, settings.dropout),
        "num_query_tokens": num_queries,
        "experts": None if experts is None else experts.model_dump(mode="json"),
    }


def with_dropout(fields: dict[str, Any], dropout: float | None) -> dict[str, Any]:
    """A Q-Former's configuration with another dropout; None leaves it."""
    if dropout is None:
        return fields
    return fields | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def with_connector(config: VLMConfig, settings: ModelSettings) -> VLMConfig:
    """The configuration of a whole model with the connector that a recipe wants: as it is, or its Q-Former with experts.

    Raises:
        ValueError: a connector that the model does not have, or experts that do not fit those that it has.
    """
    wanted, where = settings.connector, f"model.from_pretrained: {settings.from_pretrained}"
    if wanted is None:
        return config
    if isinstance(wanted, MLPConnectorSettings):
        if config.qformer_config is not None:
            raise ValueError(f"model.connector.kind: mlp, but {where} has a Q-Former; allowed: qformer, qmoe, or null")
        return config
    if config.qformer_config is None:
        raise ValueError(f"model.connector.kind: {wanted.kind}, but {where} has a projector; allowed: mlp, or null")
    if wanted.num_queries not in (None, config.num_query_tokens):
        raise ValueError(
            f"model.connector.num_queries: {wanted.num_queries}, but {where} has {config.num_query_tokens}; allowed: that, "
            "or null"
        )
    fields = config.to_dict()
    key = "qformer" if isinstance(config, MoELlavaConfig) else "qformer_config"
    config = type(config).from_dict(fields | {key: with_dropout(fields[key], wanted.dropout)})
    there = config.expert_settings
    if not isinstance(wanted, QMoEConnectorSettings):
        if there is not None:
            raise ValueError(f"model.connector.kind: qformer, but {where} is a Q-MoE; allowed: qmoe, or null")
        return config
    if there is not None:
        for name in ("num_experts", "has_general_expert", "num_layers", "router"):
            if getattr(there, name) != getattr(wanted.experts, name):
                raise ValueError(
                    f"model.connector.experts.{name}: {getattr(wanted.experts, name)}, but {where} has "
                    f"{getattr(there, name)}; allowed: that (experts are there already)"
                )
    return with_fields(config, experts=wanted.experts.model_dump(mode="json"))


def load_qformer(settings: QFormerConnectorSettings, config: MoELlavaConfig, *, dtype: torch.dtype) -> QFormerConnector:
    """The connector itself: read, or drawn from torch's generator; the projection into the language model is new."""
    assert settings.qformer is not None
    qformer_config, experts = config.qformer_config, config.expert_settings
    assert qformer_config is not None
    is_read = settings.qformer.from_pretrained is not None
    with init_empty_weights(include_buffers=False) if is_read else nullcontext():
        qformer = InstructBlipQFormerModel._from_config(qformer_config)
    connector = QFormerConnector(
        qformer, num_queries=config.num_query_tokens, language_width=config.text_config.hidden_size
    )
    if settings.qformer.from_pretrained is not None:
        folder = Path(resolve(settings.qformer.from_pretrained))
        source = open_blip(folder, text_from=settings.text_from)
        fill_from(connector, source, keep=("language_projection.",))
    if experts is not None:
        connector.qformer = upcycle_qformer(connector.qformer, experts)
    return connector.to(dtype)


def _source_config(settings: QFormerConnectorSettings) -> MoEInstructBlipConfig:
    assert settings.qformer is not None and settings.qformer.from_pretrained is not None
    folder = Path(resolve(settings.qformer.from_pretrained))
    config = AutoConfig.from_pretrained(folder)
    if not is_blip(config):
        raise ValueError(
            f"model.connector.qformer: {settings.qformer.from_pretrained} is a {config.model_type}; allowed: a folder in the "
            "layout of InstructBLIP or BLIP-2"
        )
    return blip_config(config, folder, text_from=settings.text_from)
