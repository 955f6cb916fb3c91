"""The one way in and the one way out: opening a model of ours, and writing a converted one as a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlavaConfig, LlavaProcessor

from moe_lvlm.checkpoint.files import Advance
from moe_lvlm.checkpoint.model_folder import DEFAULT_SHARD_BYTES, WrittenFolder, plan_shards
from moe_lvlm.checkpoint.source import LazySource, WeightSource
from moe_lvlm.conversion.bin_shards import open_weights
from moe_lvlm.conversion.parameters import count_parameters
from moe_lvlm.conversion.target import LLAVA_RULES, build_target
from moe_lvlm.conversion.tree import saved_files, write_model_tree
from moe_lvlm.models.build import is_plain_llava, llava_config_of
from moe_lvlm.models.build import open_weights as open_our_weights
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig
from moe_lvlm.models.load import find_model
from moe_lvlm.models.processor import Processor, class_tokens, load_processor

CONFIG_FILE = "config.json"
_ARCHITECTURES = {
    MoELlavaConfig.model_type: "MoELlavaForConditionalGeneration",
    MoEInstructBlipConfig.model_type: "MoEInstructBlipForConditionalGeneration",
}


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model of ours that is still on the disk: weights under our names."""

    config: MoELlavaConfig
    weights: WeightSource
    processor: LlavaProcessor


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What a conversion gives; no weight has been read yet.

    before: the configuration that it was made from, as far as it has this form. notes: what a user should know.
    """

    config: LlavaConfig | MoEInstructBlipConfig
    weights: LazySource
    processor: Processor
    before: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def to(self, dtype: torch.dtype | None) -> Converted:
        """The same model with floating-point weights of another type; None leaves them."""
        return replace(self, weights=self.weights.to(dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What would be written. num_activated: parameters that a token with `top_k` experts uses.
    differences: lines `key: before -> after` of the configuration."""

    num_tensors: int
    num_bytes: int
    num_files: int
    num_parameters: int
    num_activated: int
    differences: tuple[str, ...]


def open_model(path: str | Path) -> OpenModel:
    """A run, a checkpoint, a model folder of ours, or transformers' own LLaVA under any of its names.

    Raises:
        ValueError: none of these, or a LLaVA whose weights are not those that its configuration describes.
    """
    model_folder, processor_folder = find_model(path)
    config = llava_config_of(model_folder)
    if is_plain_llava(model_folder):
        target = build_target(config)
        weights: WeightSource = target.complete(target.adopt(open_weights(model_folder), LLAVA_RULES))
    else:
        weights = open_our_weights(model_folder)
    return OpenModel(config, weights, _complete_processor(load_processor(processor_folder), config, processor_folder))


def _complete_processor(processor: LlavaProcessor, config: MoELlavaConfig, folder: Path) -> LlavaProcessor:
    """Old LLaVA folders do not say how many placeholders an image takes; their configuration does."""
    if processor.image_token_id != config.image_token_index:
        raise ValueError(
            f"{folder}: the image token {processor.image_token!r} is {processor.image_token_id} in the tokenizer, "
            f"image_token_index is {config.image_token_index}"
        )
    if processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
        processor.num_additional_image_tokens = class_tokens(config.vision_config)
    if processor.vision_feature_select_strategy is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    return processor


def summarize(converted: Converted, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Summary:
    """What `write_converted` would write."""
    shards = plan_shards(converted.weights, max_shard_bytes=max_shard_bytes)
    moe = converted.config.moe_config if isinstance(converted.config, MoELlavaConfig) else None
    parameters = count_parameters(converted.weights, moe)
    return Summary(
        num_tensors=len(converted.weights.tensors),
        num_bytes=shards.num_bytes,
        num_files=len(shards.names_of),
        num_parameters=parameters.total,
        num_activated=parameters.activated,
        differences=tuple(_differences(converted.before, converted.config.to_dict())),
    )


def write_converted(
    converted: Converted,
    target: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    is_overwriting: bool = False,
    advance: Advance = lambda num_bytes: None,
) -> WrittenFolder:
    """Write a model with its processor, for `moe_lvlm.load` and a recipe's `model.from_pretrained`.

    advance: told of the bytes written, out of `summarize(...).num_bytes`.

    Raises:
        ValueError: the target exists and may not be replaced.
        OSError: the disk is full, or fails; nothing is left behind then.
    """
    return write_model_tree(
        target,
        converted.weights,
        documents=_documents(converted),
        max_shard_bytes=max_shard_bytes,
        is_overwriting=is_overwriting,
        advance=advance,
    )


def _documents(converted: Converted) -> dict[str, bytes]:
    """config.json, generation_config.json, and what the processor saves."""
    config = type(converted.config).from_dict(without_paths(converted.config.to_dict()))
    embeddings = next(name for name in converted.weights.names() if name.endswith("embed_tokens.weight"))
    config.dtype = converted.weights.dtype(embeddings)
    if isinstance(config, MoELlavaConfig | MoEInstructBlipConfig):
        config.architectures = [_ARCHITECTURES[config.model_type]]
    tokenizer = converted.processor.tokenizer
    generation = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return saved_files(converted.processor.save_pretrained) | {
        CONFIG_FILE: config.to_json_string(use_diff=True).encode(),
        "generation_config.json": generation.to_json_string(use_diff=True).encode(),
    }


def without_paths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the folders of this machine from which its parts were read."""
    nested = {key: without_paths(value) if isinstance(value, Mapping) else value for key, value in fields.items()}
    nested.pop("_name_or_path", None)
    if "start_from" in nested:  # adapters have begun
        nested["start_from"] = None
    return nested


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json as it stands there, for layouts that transformers does not know.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not path.is_file():
        raise ValueError(f"{folder}: has no {CONFIG_FILE}, so it is no model folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds {type(data).__name__}; allowed: an object")
    return data


# What says nothing about the model.
_UNIMPORTANT = frozenset({"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "auto_map"})


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Keys with another value, of the sections that `before` has; a section that comes or goes is one of them."""
    for key in sorted(before.keys() - _UNIMPORTANT):
        old, new = before[key], after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            both = {name: (old.get(name), new.get(name)) for name in (old.keys() | new.keys()) - _UNIMPORTANT}
            changed = {f"{key}.{name}": pair for name, pair in sorted(both.items())}
        else:
            changed = {key: (old, new)}
        for name, (was, now) in changed.items():
            if was != now:
                yield f"{name}: {json.dumps(was, default=str)} -> {json.dumps(now, default=str)}"
