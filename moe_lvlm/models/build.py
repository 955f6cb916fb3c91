"""A dense vision-language model from a recipe's parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import is_flash_attn_2_available

from moe_lvlm.checkpoint.source import WeightSource, open_source
from moe_lvlm.config.connector import MLPConnectorSettings, PartSettings, QFormerConnectorSettings
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.blip import blip_config, is_blip, open_blip
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.images import image_size
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig, VLMConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.processor import Processor, build_processor, num_image_tokens, with_qformer
from moe_lvlm.models.qformer import load_qformer, qformer_fields
from moe_lvlm.models.upcycle import as_moe_llava

VLM: TypeAlias = MoELlavaForConditionalGeneration | MoEInstructBlipForConditionalGeneration

logger = logging.getLogger(__name__)

# Families whose language-model head has a bias.
HEAD_BIAS = frozenset({"phi"})


def choose_attention(wanted: str) -> str:
    """The attention that is used: the one wanted, or SDPA, with a line in the log, where flash-attn is not installed."""
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        logger.warning("model.attention: flash_attention_2 is not installed here, sdpa is used")
        return "sdpa"
    return wanted


def build_config(settings: ModelSettings) -> tuple[MoELlavaConfig, Processor]:
    """The configuration of a model made of parts, its language model dense, and its processor; reads no weight.

    Raises:
        ValueError: parts that are not supported, or do not fit each other.
    """
    assert settings.vision_tower is not None and settings.language_model is not None
    vision = _part_config(settings.vision_tower, settings)
    vision = getattr(vision, "vision_config", vision)  # a whole CLIP or SigLIP: its tower
    text = _part_config(settings.language_model, settings)
    processor: Processor = build_processor(settings, vision)
    connector: dict[str, Any] = {}
    if isinstance(settings.connector, QFormerConnectorSettings):
        connector = qformer_fields(settings.connector, vision_width=vision.hidden_size)
        processor = with_qformer(processor, settings.connector, num_queries=connector["num_query_tokens"])
        _check_words(processor, connector["qformer"])
    elif isinstance(settings.connector, MLPConnectorSettings):
        connector = {
            "projector_hidden_act": settings.connector.activation,
            "multimodal_projector_bias": settings.connector.bias,
        }
    vocab_size = len(processor.tokenizer)
    if vocab_size > text.vocab_size:
        text.vocab_size = -(-vocab_size // 64) * 64
    config = MoELlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=num_image_tokens(processor, *image_size(vision)),
        vision_feature_layer=settings.vision_tower.feature_layer,
        vision_feature_select_strategy=settings.vision_tower.feature_select,
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        language_head_bias=text.model_type in HEAD_BIAS,
        **connector,
    )
    config.pad_token_id = processor.tokenizer.pad_token_id
    config.bos_token_id = processor.tokenizer.bos_token_id
    config.eos_token_id = processor.tokenizer.eos_token_id
    return config, processor


def _check_words(processor: Processor, qformer: Mapping[str, Any]) -> None:
    words = len(processor.qformer_tokenizer)
    if words > qformer["vocab_size"]:
        raise ValueError(
            f"model.connector.tokenizer: {words} tokens, but the Q-Former embeds {qformer['vocab_size']} (vocab_size); "
            "allowed: as many or fewer"
        )


def _part_config(part: PartSettings, settings: ModelSettings) -> PreTrainedConfig:
    if part.from_pretrained is not None:
        return AutoConfig.from_pretrained(resolve(part.from_pretrained), trust_remote_code=settings.trust_remote_code)
    fields: dict[str, Any] = dict(part.from_config or {})
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("from_config: model_type is missing (clip_vision_model, llama, qwen2, ...)")
    return AutoConfig.for_model(model_type, **fields)


@dataclass(frozen=True, slots=True)
class NewWeights:
    """What no pretrained part brings, float32. projector: by its own parameter names; empty where a Q-Former stands in
    its place. embedding_rows, head_rows: of the tokens that the language model did not know, [new tokens, D]."""

    projector: Mapping[str, Tensor]
    embedding_rows: Tensor
    head_rows: Tensor


def draw_new_weights(config: MoELlavaConfig, *, num_new_tokens: int) -> NewWeights:
    """Draw them from torch's generator: the projector as torch initialises linear layers, rows from N(0, s) with the
    language model's own s. It comes before all else that a seed decides, so that a conversion draws the same."""
    drawn: dict[str, Tensor] = {}
    with init_empty_weights():
        projector = nn.Module() if config.qformer is not None else LlavaMultiModalProjector(config)
    for name, linear in projector.named_children():
        if isinstance(linear, nn.Linear):
            new = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
            drawn |= {f"{name}.{leaf}": parameter.detach() for leaf, parameter in new.named_parameters()}
    std = getattr(config.text_config, "initializer_range", None) or 0.02
    shape = (num_new_tokens, config.text_config.hidden_size)
    return NewWeights(drawn, torch.randn(shape) * std, torch.randn(shape) * std)


def num_new_tokens(settings: ModelSettings, config: MoELlavaConfig) -> int:
    """By how many rows the vocabulary of a pretrained language model grows."""
    assert settings.language_model is not None
    if settings.language_model.from_pretrained is None:
        return 0
    return config.text_config.vocab_size - _part_config(settings.language_model, settings).vocab_size


def build_dense(
    settings: ModelSettings, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[MoELlavaForConditionalGeneration, Processor]:
    """Tower and language model as the settings give them, and a connector; everything new is drawn from `seed`.

    Memory: each pretrained part is read once, tensor by tensor, into its place.
    """
    config, processor = build_config(settings)
    config._attn_implementation = choose_attention(settings.attention)
    assert settings.vision_tower is not None and settings.language_model is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = draw_new_weights(config, num_new_tokens=num_new_tokens(settings, config))
        tower = _build_tower(settings.vision_tower, settings, config.vision_config, dtype)
        language = _build_language_model(settings.language_model, settings, config.text_config, dtype, new)
        with init_empty_weights(include_buffers=True):
            model = MoELlavaForConditionalGeneration(config)
        if isinstance(settings.connector, QFormerConnectorSettings):
            model.model.connector = load_qformer(settings.connector, config, dtype=dtype)
    model.model.multi_modal_projector.load_state_dict(new.projector, assign=True)
    model.model.multi_modal_projector.to(dtype)
    model.take_parts(tower=tower, language_model=language.base_model, head=language.get_output_embeddings())
    model.tie_weights()
    _set_generation_tokens(model, processor)
    return model, processor


def _build_tower(
    part: PartSettings, settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    config._attn_implementation = choose_attention(settings.attention)
    if part.from_pretrained is None:
        return _cast_parameters(AutoModel.from_config(config), dtype)
    # A folder that holds a whole CLIP gives its tower: the class follows the tower's own config.
    tower_class = AutoModel._model_mapping[type(config)]
    return tower_class.from_pretrained(resolve(part.from_pretrained), config=config, dtype=dtype)


def _build_language_model(
    part: PartSettings, settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype, new: NewWeights
) -> PreTrainedModel:
    vocab_size = config.vocab_size
    if part.from_pretrained is None:
        config._attn_implementation = choose_attention(settings.attention)
        language = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
        _cast_parameters(language, dtype)
    else:
        language = AutoModelForCausalLM.from_pretrained(
            resolve(part.from_pretrained),
            dtype=dtype,
            attn_implementation=choose_attention(settings.attention),
            trust_remote_code=settings.trust_remote_code,
        )
    if language.get_input_embeddings().weight.shape[0] < vocab_size:
        language.resize_token_embeddings(vocab_size, mean_resizing=False)
        _set_new_rows(language, new)
    if (language.get_output_embeddings().bias is not None) != (config.model_type in HEAD_BIAS):
        raise ValueError(
            f"{type(language).__name__}: a language-model head with a bias is known for {sorted(HEAD_BIAS)} only"
        )
    return language


def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself. Buffers stay as in a model that is read: rotary frequencies lose too much in bf16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _set_new_rows(language: PreTrainedModel, new: NewWeights) -> None:
    """Give the last rows of the embeddings, and of a head of its own, their values; a head's bias is 0 there."""
    embeddings, head = language.get_input_embeddings().weight, language.get_output_embeddings().weight
    first = embeddings.shape[0] - new.embedding_rows.shape[0]
    embeddings[first:] = new.embedding_rows.to(embeddings.dtype)
    if head is not embeddings:
        head[first:] = new.head_rows.to(head.dtype)


def _set_generation_tokens(model: MoELlavaForConditionalGeneration, processor: Processor) -> None:
    tokenizer = processor.tokenizer
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def build_empty(config: VLMConfig) -> VLM:
    """The model on meta tensors (non-persistent buffers real), to be filled by `load_weights`."""
    with init_empty_weights(include_buffers=False):
        if isinstance(config, MoEInstructBlipConfig):
            return MoEInstructBlipForConditionalGeneration(config)
        return MoELlavaForConditionalGeneration(config)


def is_plain_llava(path: str | Path) -> bool:
    """Whether a folder (or hub name) holds transformers' own LLaVA, dense and in its names, rather than ours."""
    return AutoConfig.from_pretrained(path).model_type == "llava"


def load_plain_llava(
    path: str | Path, *, dtype: torch.dtype, attention: str = "sdpa"
) -> MoELlavaForConditionalGeneration:
    """Transformers' own LLaVA as our dense model, read by transformers, which knows its older names.

    Raises:
        ValueError: a tensor is missing or has no place, or the language model has experts of transformers' own.
    """
    text = AutoConfig.from_pretrained(path).text_config
    if hasattr(text, "num_experts_per_tok"):
        raise ValueError(
            f"{path}: LLaVA around {text.model_type}, experts of transformers' own, as `tools/export.py` writes stock "
            "folders; load it with transformers (LlavaForConditionalGeneration.from_pretrained)"
        )
    model, found = LlavaForConditionalGeneration.from_pretrained(
        path, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            raise ValueError(f"{path}: {problem.replace('_', ' ')}: {sorted(map(str, found[problem]))[:5]}")
    return as_moe_llava(model)


def config_of(path: str | Path, *, text_from: str | None = None) -> VLMConfig:
    """The configuration saved in a model's or a checkpoint's folder, as ours.

    text_from: of a BLIP-2, see `QFormerConnectorSettings`.

    Raises:
        ValueError: neither a LLaVA nor an InstructBLIP or BLIP-2.
    """
    config = AutoConfig.from_pretrained(path)
    if is_blip(config):
        return blip_config(config, Path(path), text_from=text_from)
    if config.model_type == "llava":
        config = MoELlavaConfig.from_dict(config.to_dict() | {"model_type": MoELlavaConfig.model_type})
    if not isinstance(config, MoELlavaConfig | MoEInstructBlipConfig):
        raise ValueError(
            f"{path}: model_type {config.model_type!r}; allowed: llava, instructblip, blip-2, "
            f"{MoELlavaConfig.model_type}, {MoEInstructBlipConfig.model_type}"
        )
    return config


def llava_config_of(path: str | Path) -> MoELlavaConfig:
    """The same for what handles LLaVA with its projector only.

    Raises:
        ValueError: any other model.
    """
    config = config_of(path)
    if not isinstance(config, MoELlavaConfig) or config.qformer is not None:
        kind = config.model_type if config.qformer_config is None else f"{config.model_type} with a Q-Former"
        raise ValueError(f"{path}: {kind}; allowed here: a LLaVA with its projector (connector kind mlp)")
    return config


def open_weights(path: Path, *, text_from: str | None = None) -> WeightSource:
    """The weights of a folder that `config_of` knows, under our names."""
    if is_blip(AutoConfig.from_pretrained(path)):
        return open_blip(path, text_from=text_from)
    return open_source(path)
