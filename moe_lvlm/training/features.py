"""The frozen tower of a recipe by itself, to make a feature cache with, and whether a cache is this recipe's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlavaForConditionalGeneration, PreTrainedModel

from moe_lvlm.checkpoint.source import LazySource, LazyTensor
from moe_lvlm.config.recipe import ModelSettings, Recipe, StageSettings
from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.features import MADE_BY, Fingerprint, differences
from moe_lvlm.data.mixture import open_features
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.build import (
    VLM,
    build_config,
    build_empty,
    choose_attention,
    config_of,
    draw_new_weights,
    is_plain_llava,
    num_new_tokens,
    open_weights,
)
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.models.instructblip_config import VLMConfig
from moe_lvlm.models.load import find_model
from moe_lvlm.models.processor import Processor
from moe_lvlm.models.tower import is_frozen, tower_features
from moe_lvlm.models.tower_facts import tower_facts
from moe_lvlm.models.weights import fill_from
from moe_lvlm.training.build import DTYPES, stage_config
from moe_lvlm.training.trainable import select_trainable

# Of an image processor's settings, what names its class and not what it does.
_NOT_SETTINGS = ("image_processor_type", "processor_class", "_processor_class", "auto_map")


@dataclass(frozen=True, slots=True)
class FrozenTower:
    """A tower and which of its features the connector reads; see `tower_features`."""

    module: PreTrainedModel
    layer: int | list[int] | None
    select: str | None

    @torch.inference_mode()
    def features(self, pixel_values: Tensor) -> Tensor:
        """[I, C, H, W], in any type and place, to [I, M, D] where the tower is."""
        parameter = next(self.module.parameters())
        pixels_ICHW = pixel_values.to(parameter.device, parameter.dtype)
        return tower_features(self.module, pixels_ICHW, layer=self.layer, select=self.select)

    def fingerprint(self, processor: Processor) -> Fingerprint:
        """All that the features depend on besides the image."""
        facts = {f"vision tower: {name}": value for name, value in tower_facts(self.module).items()}
        settings = processor.image_processor.to_dict()
        facts |= {f"image processor: {name}": settings[name] for name in settings.keys() - set(_NOT_SETTINGS)}
        facts |= {"feature_layer": self.layer, "feature_select": self.select}
        plain: Fingerprint = json.loads(json.dumps(facts, sort_keys=True))
        return plain


def load_frozen_tower(recipe: Recipe, *, device: torch.device | str = "cpu") -> FrozenTower:
    """The tower with which a recipe's stages begin, in evaluation mode and in the run's precision. Of a language model it
    reads at most the embeddings and the head.

    Raises:
        ValueError: as the run itself would of the model's parts.
    """
    config = stage_config(recipe, 0)
    dtype = DTYPES[recipe.train.precision]
    if recipe.model.from_pretrained is None:
        module = _tower_of_parts(recipe.model, seed=recipe.seed, dtype=dtype)
    else:
        folder, _ = find_model(recipe.model.from_pretrained)
        module = _tower_of_folder(folder, recipe.model, dtype=dtype)
    layer, select = feature_choice(config)
    return FrozenTower(module.to(device).eval().requires_grad_(False), layer, select)


def feature_choice(config: VLMConfig) -> tuple[int | list[int] | None, str | None]:
    """`layer` and `select` of `tower_features` for a model."""
    if not hasattr(config, "vision_feature_layer"):
        return None, None
    return config.vision_feature_layer, config.vision_feature_select_strategy


def check_feature_cache(recipe: Recipe, processor: Processor) -> None:
    """Whether the recipe's cache, if it names one, holds what its tower makes of its images.

    Raises:
        ValueError: no cache in the folder, or one of another tower, another image processor or other features.
    """
    cache = open_features(recipe.data)
    if cache is None:
        return
    different = differences(cache.fingerprint, load_frozen_tower(recipe).fingerprint(processor))
    if different:
        raise DataFileError(
            f"data.feature_cache: {cache.folder} was made with another tower, image processor or choice of features: "
            f"{'; '.join(different)}; allowed: a cache that {MADE_BY} made with this recipe's"
        )


def check_stage_tower(stage: StageSettings, model: VLM) -> None:
    """Whether a stage leaves the tower as it is, which a cache takes for granted. model: what it trains chosen.

    Raises:
        ValueError: it trains some of the tower.
    """
    tower = vision_tower(model)
    if not is_frozen(tower):
        trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
        raise ValueError(
            f"stage {stage.name}: train: {', '.join(stage.train)} trains the vision tower ({len(trained)} parameters, "
            f"such as {trained[0]}), but a feature cache holds the features of a frozen one; allowed: parts without the "
            "tower, or no data.feature_cache"
        )


def check_towers(recipe: Recipe) -> None:
    """The same for every stage of a recipe."""
    for index, stage in enumerate(recipe.stages):
        model = build_empty(stage_config(recipe, index))
        select_trainable(model, stage.train)
        check_stage_tower(stage, model)


def vision_tower(model: VLM) -> nn.Module:
    """The tower of either kind of model."""
    if isinstance(model, MoEInstructBlipForConditionalGeneration):
        return model.vision_model
    return model.model.vision_tower


def _tower_of_parts(settings: ModelSettings, *, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """As `build_dense` makes it."""
    config, _ = build_config(settings)
    assert settings.vision_tower is not None
    vision = config.vision_config
    vision._attn_implementation = choose_attention(settings.attention)
    source = settings.vision_tower.from_pretrained
    if source is not None:
        return AutoModel._model_mapping[type(vision)].from_pretrained(resolve(source), config=vision, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw_new_weights(config, num_new_tokens=num_new_tokens(settings, config))  # which is drawn before the tower
        tower: PreTrainedModel = AutoModel.from_config(vision)
    return tower.to(dtype)


def _tower_of_folder(folder: Path, settings: ModelSettings, *, dtype: torch.dtype) -> PreTrainedModel:
    """The tower of a whole model: of transformers' own LLaVA, of a published InstructBLIP or BLIP-2, or of ours."""
    if is_plain_llava(folder):
        return _tower_of_plain_llava(folder, settings, dtype=dtype)
    text_from = getattr(settings.connector, "text_from", None)
    config = config_of(folder, text_from=text_from)
    config._attn_implementation = choose_attention(settings.attention)
    model = build_empty(config)
    tower = vision_tower(model)
    assert isinstance(tower, PreTrainedModel)
    prefix = next(f"{name}." for name, module in model.named_modules() if module is tower)
    source = open_weights(folder, text_from=text_from)
    tensors = {
        name.removeprefix(prefix): LazyTensor.from_source(source, name)
        for name in source.names()
        if name.startswith(prefix)
    }
    fill_from(tower, LazySource(tensors).to(dtype))
    return tower


def _tower_of_plain_llava(folder: Path, settings: ModelSettings, *, dtype: torch.dtype) -> PreTrainedModel:
    """Transformers knows the older names of such folders; its language model is read without layers."""
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = 0
    if getattr(config.text_config, "layer_types", None) is not None:
        config.text_config.layer_types = []
    model, found = LlavaForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=choose_attention(settings.attention),
        output_loading_info=True,
    )
    missing = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in found[kind]]
    if of_tower := sorted(name for name in missing if "vision_tower" in name):
        raise ValueError(f"{folder}: no weights for {', '.join(of_tower[:5])} of the vision tower")
    tower: PreTrainedModel = model.model.vision_tower
    return tower
