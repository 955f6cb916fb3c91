"""What the original LLaVA layout and MoE-LLaVA's have in common: a language model's flat configuration with LLaVA's
keys (`mm_...`) in it, its weights with the projector's among them, and a tower that usually lies elsewhere.

The image token: these models mark an image by the id -200, which no vocabulary has. Ours is a token, so it is added to
the tokenizer; where the vocabulary is full, embeddings and head grow to the next multiple of 64, as `build_config`
does for any model made of parts, by rows drawn from a seed as `build_dense` draws them. The image token's own row is
never read, since the image's features stand in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlavaProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_lvlm.checkpoint.source import LazyTensor, WeightSource
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.conversion.bin_shards import open_weights
from moe_lvlm.conversion.folder import read_config
from moe_lvlm.conversion.parts import EMBEDDINGS, HEAD_BIAS, draw_new, tower_tensors, with_new_rows
from moe_lvlm.conversion.target import Rules, Target
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.build import build_config
from moe_lvlm.models.config import MoELlavaConfig

RULES: Rules = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.image_tower.image_tower.vision_model.", "vision_tower."),
    ("model.image_tower.image_tower.", "vision_tower."),
    ("model.mm_projector.image_spatial_proj.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.image_spatial_proj.2.", "multi_modal_projector.linear_2."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.", "language_model."),
)
_TOWERS = ("model.vision_tower.", "model.image_tower.")

FEATURE_SELECT = {"patch": "default", "cls_patch": "full"}
# Keys of a flat configuration that are not the language model's own, though it knows them.
_NOT_TEXT = frozenset({"model_type", "architectures", "transformers_version", "_name_or_path", "auto_map"})
# Keys that transformers takes though its configurations no longer show them under these names.
_ALSO_TEXT = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype"})


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalOptions:
    """What the layout leaves open. vision_tower: a folder; None takes the one that the configuration names, if it is
    there. tokenizer, image_processor: folders; None takes the model's and the tower's. seed: where rows of new tokens
    come from."""

    vision_tower: str | None = None
    tokenizer: str | None = None
    image_processor: str | None = None
    image_token: str = "<image>"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalModel:
    """A folder in one of the two layouts. text: the language model's keys. tower: the folder with its configuration."""

    folder: Path
    fields: Mapping[str, Any]
    text: Mapping[str, Any]
    source: WeightSource
    tower: Path
    options: OriginalOptions

    def build_config(self) -> tuple[MoELlavaConfig, LlavaProcessor]:
        """Our dense configuration, and the processor."""
        settings = ModelSettings.model_validate(
            {
                "vision_tower": {
                    "from_pretrained": str(self.tower),
                    "feature_layer": self.fields.get("mm_vision_select_layer", -2),
                    "feature_select": self._feature_select(),
                },
                "language_model": {"from_config": dict(self.text)},
                "tokenizer": self.options.tokenizer or str(self.folder),
                "image_processor": self.options.image_processor,
                "image_token": self.options.image_token,
            }
        )
        try:
            config, processor = build_config(settings)
        except OSError as error:
            raise ValueError(f"{self.folder}: no usable tokenizer or image processor: {error}") from error
        # MoE-LLaVA's Phi has a head without a bias, Phi alone has one: the weights say which.
        config.language_head_bias = HEAD_BIAS in self.source.names()
        return config, processor

    def tensors(self, target: Target, *, is_wanted: Callable[[str], bool] = lambda name: True) -> dict[str, LazyTensor]:
        """All weights under our names, the tower's from the model's own file if it has them; rows of new tokens too."""
        found = target.adopt(self.source, RULES, is_wanted=is_wanted)
        if not any(name.startswith(_TOWERS) for name in self.source.names()):
            found |= tower_tensors(target, self.tower)
        if EMBEDDINGS not in found:
            return found
        config = target.model.config
        num_new = config.text_config.vocab_size - found[EMBEDDINGS].num_rows
        return with_new_rows(found, draw_new(config, num_new_tokens=max(num_new, 0), seed=self.options.seed))

    def _feature_select(self) -> str:
        select = self.fields.get("mm_vision_select_feature") or "patch"
        if select not in FEATURE_SELECT:
            raise ValueError(
                f"{self.folder}: mm_vision_select_feature: {select!r}; allowed: {', '.join(FEATURE_SELECT)}"
            )
        return FEATURE_SELECT[select]


def open_original(
    folder: Path,
    *,
    families: Mapping[str, str],
    tower_key: str,
    projector_keys: Sequence[str],
    renames: Mapping[str, str],
    options: OriginalOptions,
) -> OriginalModel:
    """A folder in the original layout.

    families: its model_type -> that of the language model. tower_key, projector_keys: where the configuration names
    the tower and the kind of projector. renames: keys that transformers calls otherwise.

    Raises:
        ValueError: an unknown family, a projector other than two layers with GELU, a tower that is not CLIP's or is
            not here, or weights that cannot be read.
    """
    fields = read_config(folder)
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in families:
        raise ValueError(f"{folder}: model_type {family!r}; allowed: {', '.join(sorted(families))}")
    projector = next((fields[key] for key in projector_keys if fields.get(key)), "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(f"{folder}: {projector_keys[0]}: {projector!r}; allowed: mlp2x_gelu")
    tower = _find_tower(folder, fields, tower_key, options.vision_tower)
    text = {"model_type": families[family], **_text_fields(families[family], fields, renames)}
    return OriginalModel(
        folder=folder, fields=fields, text=text, source=open_weights(folder), tower=tower, options=options
    )


def _find_tower(folder: Path, fields: Mapping[str, Any], key: str, wanted: str | None) -> Path:
    named = fields.get(key)
    if wanted is None and not (isinstance(named, str) and Path(named).is_dir()):
        raise ValueError(
            f"{folder}: its vision tower {named!r} ({key}) is no folder here: say where it is, --vision-tower"
        )
    tower = resolve(str(named) if wanted is None else wanted)
    config = read_config(tower)
    vision = config.get("vision_config", config)
    kind = vision.get("model_type", config.get("model_type"))
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{tower}: vision tower {kind!r}; allowed: CLIP, whose first token this layout leaves out")
    return tower


def _text_fields(model_type: str, fields: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """The keys that the language model's configuration knows; LLaVA's own and those of the training are left out."""
    known = (CONFIG_MAPPING[model_type]().to_dict().keys() | _ALSO_TEXT) - _NOT_TEXT
    named = {renames.get(key, key): value for key, value in fields.items()}
    return {key: value for key, value in named.items() if key in known}


def text_config_dict(text: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration before anything of ours, to compare with."""
    return AutoConfig.for_model(**text).to_dict()
