"""Sizes of published models that recipes name, so that they are planned where neither the hub nor their files are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from moe_lvlm.config.connector import MLPConnectorSettings, PartSettings, QFormerConnectorSettings
from moe_lvlm.config.recipe import ModelSettings, Recipe
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.build import HEAD_BIAS, VLM, build_empty, choose_attention
from moe_lvlm.models.config import MoELlavaConfig, with_fields
from moe_lvlm.models.images import image_size
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig, VLMConfig
from moe_lvlm.models.qformer import qformer_fields, with_connector
from moe_lvlm.training.build import is_sparse_at, stage_config
from moe_lvlm.training.trainable import select_trainable

_CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
# From the config.json of each; what is not here is the default of its class in transformers.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
    "openai/clip-vit-large-patch14": _CLIP_L | {"image_size": 224},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
    "stabilityai/stablelm-2-1_6b": {
        "model_type": "stablelm",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": True,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
    },
    "microsoft/phi-2": {
        "model_type": "phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.4,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "resid_pdrop": 0.1,
    },
    "Qwen/Qwen1.5-1.8B": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "lmsys/vicuna-7b-v1.5": _LLAMA_7B,
    # InstructBLIP's layout around parts that only their stage I has taught (docs/mocle.md, docs/qmoe.md)
    "data/mocle/models/vicuna_7b_pretrained": {"model_type": "instructblip", "text_config": _LLAMA_7B},
    "data/qmoe/models/vicuna_7b_pretrained": {"model_type": "instructblip", "text_config": _LLAMA_7B},
    "data/qmoe/models/flan_t5_xxl_pretrained": {
        "model_type": "instructblip",
        "text_config": {
            "model_type": "t5",
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
    },
}


def stage_model(recipe: Recipe, stage: int, *, config_dir: Path | None = None) -> VLM:
    """The model of a stage on meta tensors, what it trains chosen.

    Sizes of parts come from `config_dir/<name>/config.json` where it is, else from `PUBLISHED` where it has the name, else
    from where training would take them. With one of the first two no tokenizer is read, and the vocabulary is taken to
    have room for the image token, as those of the table have or, as LLaMA's does, get by growing to a multiple of 64.

    Raises:
        ValueError: a model that is nowhere, or that training would refuse.
    """
    config = _stage_config(recipe, stage, config_dir)
    config._attn_implementation = choose_attention(recipe.model.attention)
    model = build_empty(config)
    select_trainable(model, recipe.stages[stage].train)
    return model


def _stage_config(recipe: Recipe, stage: int, config_dir: Path | None) -> VLMConfig:
    settings = recipe.model
    parts = [part.from_pretrained for part in (settings.vision_tower, settings.language_model) if part is not None]
    names = [name for name in (settings.from_pretrained, *parts) if name is not None]
    if not any(_known(name, config_dir) for name in names):
        try:
            return stage_config(recipe, stage)
        except OSError as error:
            raise _unknown(", ".join(names), error) from error
    config = _whole(settings, config_dir) if settings.from_pretrained is not None else _of_parts(settings, config_dir)
    if is_sparse_at(recipe, stage) and isinstance(config, MoELlavaConfig):
        config = config.with_moe(recipe.moe)
    if settings.adapter is not None and any(one.adapt for one in recipe.stages[: stage + 1]):
        config = with_fields(config, adapter=settings.adapter.model_dump(mode="json"))
    return config


def _known(name: str, config_dir: Path | None) -> PreTrainedConfig | None:
    """The configuration of a name that need not be looked for."""
    if config_dir is not None and (config_dir / name / "config.json").is_file():
        return AutoConfig.from_pretrained(config_dir / name)
    if name in PUBLISHED and not resolve(name).is_dir():
        fields = dict(PUBLISHED[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    return None


def _part(part: PartSettings, config_dir: Path | None) -> PreTrainedConfig:
    if part.from_pretrained is None:
        fields: dict[str, Any] = dict(part.from_config or {})
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if (known := _known(part.from_pretrained, config_dir)) is not None:
        return known
    try:
        return AutoConfig.from_pretrained(resolve(part.from_pretrained))
    except OSError as error:
        raise _unknown(part.from_pretrained, error) from error


def _unknown(names: str, error: OSError) -> ValueError:
    return ValueError(
        f"{names}: neither here nor among the sizes that are known ({', '.join(PUBLISHED)}); allowed: --config-dir FOLDER "
        f"with FOLDER/<name>/config.json ({str(error).splitlines()[0]})"
    )


def _of_parts(settings: ModelSettings, config_dir: Path | None) -> MoELlavaConfig:
    """As `models.build.build_config`, without a processor."""
    assert settings.vision_tower is not None and settings.language_model is not None
    vision = _part(settings.vision_tower, config_dir)
    vision = getattr(vision, "vision_config", vision)
    text = _part(settings.language_model, config_dir)
    text.vocab_size = -(-text.vocab_size // 64) * 64 if text.vocab_size != 32000 else 32064
    connector: dict[str, Any] = {}
    if isinstance(settings.connector, QFormerConnectorSettings):
        connector = qformer_fields(settings.connector, vision_width=vision.hidden_size)
    elif isinstance(settings.connector, MLPConnectorSettings):
        connector = {
            "projector_hidden_act": settings.connector.activation,
            "multimodal_projector_bias": settings.connector.bias,
        }
    height, width = image_size(vision)
    return MoELlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_seq_length=(height // vision.patch_size) * (width // vision.patch_size),
        vision_feature_layer=settings.vision_tower.feature_layer,
        vision_feature_select_strategy=settings.vision_tower.feature_select,
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        language_head_bias=text.model_type in HEAD_BIAS,
        **connector,
    )


def _whole(settings: ModelSettings, config_dir: Path | None) -> VLMConfig:
    assert settings.from_pretrained is not None
    config = _known(settings.from_pretrained, config_dir)
    assert config is not None, "asked for where it is known"
    fields = config.to_dict() | {"model_type": MoEInstructBlipConfig.model_type, "image_token_index": 32000}
    if config.model_type != "instructblip":
        raise ValueError(
            f"model.from_pretrained: {settings.from_pretrained}: a {config.model_type}; allowed in --config-dir: instructblip"
        )
    return with_connector(MoEInstructBlipConfig.from_dict(fields), settings)
