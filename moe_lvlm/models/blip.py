"""InstructBLIP and BLIP-2 folders in their published layout, as configurations and weights of our InstructBLIP.

BLIP-2's Q-Former is InstructBLIP's without words: it has neither word embeddings nor text FFNs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, Blip2Config, InstructBlipConfig, PreTrainedConfig

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource, open_source
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig

# Buffers that older versions of transformers saved, and newer ones make.
_MADE = (".position_ids", ".inv_freq")
# BLIP-2's name -> InstructBLIP's
_RENAMED = {"qformer.layernorm.": "qformer.embeddings.layernorm."}
_WORDS = ("qformer.embeddings.word_embeddings.weight", "qformer.embeddings.position_embeddings.weight")


def is_blip(config: PreTrainedConfig) -> bool:
    """Whether it is transformers' own InstructBLIP or BLIP-2."""
    return config.model_type in (InstructBlipConfig.model_type, Blip2Config.model_type)


def is_published(folder: Path) -> bool:
    """Whether a folder holds transformers' own InstructBLIP or BLIP-2, rather than a model or run of ours."""
    return (folder / "config.json").is_file() and is_blip(AutoConfig.from_pretrained(folder))


def blip_config(config: PreTrainedConfig, folder: Path, *, text_from: str | None = None) -> MoEInstructBlipConfig:
    """The configuration of our InstructBLIP with a folder's parts and its own Q-Former.

    text_from: see `QFormerConnectorSettings`.

    Raises:
        ValueError: a BLIP-2 without words for its Q-Former and no `text_from`, or one whose text side does not fit; a
            folder that does not name its image token.
    """
    fields: dict[str, Any] = config.to_dict()
    if config.model_type == Blip2Config.model_type:
        fields = _blip2_fields(fields, folder, text_from)
    elif text_from is not None:
        raise ValueError(f"model.connector.text_from: {folder} is an InstructBLIP, which has a text side of its own")
    if fields.get("image_token_index") is None:
        raise ValueError(
            f"{folder / 'config.json'}: image_token_index is missing: the folder does not say which token stands for an "
            "image; save it with a newer transformers (processor and model with the token <image>)"
        )
    return MoEInstructBlipConfig.from_dict(fields | {"model_type": MoEInstructBlipConfig.model_type})


def open_blip(folder: Path, *, text_from: str | None = None) -> WeightSource:
    """The folder's weights under InstructBLIP's names, without those that transformers makes itself.

    Raises:
        ValueError: as `blip_config`.
    """
    source = open_source(folder)
    tensors = {
        _renamed(name): LazyTensor.from_source(source, name) for name in source.names() if not name.endswith(_MADE)
    }
    if AutoConfig.from_pretrained(folder).model_type == Blip2Config.model_type:
        text = _text_folder(folder, text_from)
        words = open_source(text)
        tensors |= {
            name: LazyTensor.from_source(words, name) for name in words.names() if name in _WORDS or _is_text_ffn(name)
        }
    return LazySource(tensors)


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _is_text_ffn(name: str) -> bool:
    """Of a layer's two FFNs the one that words pass: `intermediate` and `output`, not `attention.output`."""
    parts = name.split(".")
    return parts[:3] == ["qformer", "encoder", "layer"] and parts[4] in ("intermediate", "output")


def _blip2_fields(fields: dict[str, Any], folder: Path, text_from: str | None) -> dict[str, Any]:
    """InstructBLIP's keys from BLIP-2's: both describe the same modules."""
    text = InstructBlipConfig.from_pretrained(_text_folder(folder, text_from))
    words, queries = text.qformer_config, fields["qformer_config"]
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act"):
        if getattr(words, key) != queries[key]:
            raise ValueError(
                f"model.connector.text_from: {text_from}: qformer_config.{key} is {getattr(words, key)}; allowed, as in "
                f"{folder}: {queries[key]}"
            )
    shared = ("vocab_size", "max_position_embeddings", "pad_token_id")
    qformer = {key: value for key, value in queries.items() if hasattr(words, key)}
    qformer |= {key: getattr(words, key) for key in shared} | {"model_type": words.model_type}
    return fields | {
        "qformer_config": qformer,
        "vision_config": fields["vision_config"] | {"model_type": "instructblip_vision_model"},
    }


def _text_folder(folder: Path, text_from: str | None) -> Path:
    if text_from is None:
        raise ValueError(
            f"{folder}: a BLIP-2, whose Q-Former has no words to read (no word embeddings, no text FFN), so nothing could "
            "route by the instruction; allowed: an InstructBLIP folder, or model.connector.text_from: an InstructBLIP "
            "folder whose text side it takes"
        )
    text = Path(resolve(text_from))
    if AutoConfig.from_pretrained(text).model_type != InstructBlipConfig.model_type:
        raise ValueError(f"model.connector.text_from: {text_from}; allowed: an InstructBLIP folder")
    return text
