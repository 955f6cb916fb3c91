"""A dense language model and a vision tower become a vision-language model with a new projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.config.connector import PartSettings
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.conversion.bin_shards import open_weights
from moe_lvlm.conversion.folder import Converted, read_config
from moe_lvlm.conversion.target import Rules, Target, build_target, with_rows
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.build import NewWeights, build_config, draw_new_weights, num_new_tokens
from moe_lvlm.models.config import MoELlavaConfig

EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
PROJECTOR = "model.multi_modal_projector."

_LANGUAGE_RULES: Rules = (("model.", "language_model."),)
_TOWER_RULES: Rules = (("vision_model.", "vision_tower."), ("", "vision_tower."))


def from_parts(settings: ModelSettings, *, seed: int) -> Converted:
    """What `build_dense(settings, seed=seed)` makes, without reading a weight.

    The projector, and the rows of tokens that the language model did not know (the image token among them), are
    float32 until another type is asked for; all else keeps its own type.

    Raises:
        ValueError: parts that are not folders, do not fit each other, or have other weights than they say.
    """
    if settings.language_model is None or settings.vision_tower is None:
        raise ValueError("give a language model and a vision tower")
    language, tower = _folder(settings.language_model), _folder(settings.vision_tower)
    config, processor = build_config(settings)
    target = build_target(config)
    tensors = target.adopt(open_weights(language), _LANGUAGE_RULES)
    tensors |= tower_tensors(target, tower)
    new = draw_new(config, num_new_tokens=num_new_tokens(settings, config), seed=seed)
    tensors |= {f"{PROJECTOR}{name}": LazyTensor.of(tensor) for name, tensor in new.projector.items()}
    tensors = with_new_rows(tensors, new)
    before = {"text_config": _stored_config(language), "vision_config": _stored_config(tower)}
    return Converted(config=config, weights=target.complete(tensors), processor=processor, before=before)


def draw_new(config: MoELlavaConfig, *, num_new_tokens: int, seed: int) -> NewWeights:
    """What `build_dense` draws from this seed; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return draw_new_weights(config, num_new_tokens=num_new_tokens)


def with_new_rows(tensors: dict[str, LazyTensor], new: NewWeights) -> dict[str, LazyTensor]:
    """Embeddings and head grown by the rows of new tokens; a head's bias by zeros."""
    num_rows = new.embedding_rows.shape[0]
    rows = {EMBEDDINGS: new.embedding_rows, HEAD: new.head_rows, HEAD_BIAS: torch.zeros(num_rows)}
    grown: dict[str, Tensor] = {name: added for name, added in rows.items() if name in tensors and num_rows}
    return tensors | {name: with_rows(tensors[name], added) for name, added in grown.items()}


def tower_tensors(target: Target, folder: Path) -> dict[str, LazyTensor]:
    """A vision tower's weights out of its own folder, or out of one with a whole CLIP or SigLIP."""
    source: WeightSource = open_weights(folder)
    if "vision_config" in read_config(folder):
        names = [name for name in source.names() if name.startswith("vision_model.")]
        source = LazySource({name: LazyTensor.from_source(source, name) for name in names})
    return target.adopt(source, _TOWER_RULES)


def _stored_config(folder: Path) -> dict[str, Any]:
    """A part's configuration as it was before it became a part; a whole CLIP's is that of its tower."""
    config = AutoConfig.from_pretrained(folder)
    fields: dict[str, Any] = getattr(config, "vision_config", config).to_dict()
    return fields


def _folder(part: PartSettings) -> Path:
    if part.from_pretrained is None:
        raise ValueError("from_config: a conversion needs weights; allowed: from_pretrained with a folder")
    return resolve(part.from_pretrained)
