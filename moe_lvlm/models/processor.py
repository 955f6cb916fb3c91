"""The processor: tokenizer, image processor, and how many placeholders an image takes."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_backends import PilBackend

from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.data.packs import resolve

logger = logging.getLogger(__name__)

# One of them is in every folder to which a processor was saved; older ones have the second.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# Tokens that a tower puts before those of the patches.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}


def build_processor(settings: ModelSettings, vision_config: PreTrainedConfig) -> LlavaProcessor:
    """Tokenizer and image processor of a model made of parts.

    Raises:
        ValueError: a tokenizer that is not given, or a tower whose class tokens are not known.
    """
    assert settings.language_model is not None and settings.vision_tower is not None
    tokenizer_from = settings.tokenizer or settings.language_model.from_pretrained
    if tokenizer_from is None:
        raise ValueError("model.tokenizer: needed, since model.language_model.from_config brings none")
    tokenizer = AutoTokenizer.from_pretrained(
        resolve(tokenizer_from), trust_remote_code=settings.trust_remote_code, use_fast=True
    )
    prepare_tokenizer(tokenizer, settings.image_token)
    image_from = settings.image_processor or settings.vision_tower.from_pretrained
    image_processor = (
        default_image_processor(vision_config)
        if image_from is None
        else AutoImageProcessor.from_pretrained(resolve(image_from), backend="pil")
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=settings.vision_tower.feature_select,
        num_additional_image_tokens=class_tokens(vision_config),
        image_token=settings.image_token,
        chat_template=tokenizer.chat_template,
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, image_token: str) -> None:
    """Give it the image token, and a padding token if it has none."""
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]})
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token will do.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        logger.info("the tokenizer has no padding token: %r pads", tokenizer.pad_token)


def default_image_processor(vision_config: PreTrainedConfig) -> PilBackend:
    """CLIP's, at the tower's own size."""
    height, width = image_size(vision_config)
    return CLIPImageProcessorPil(size={"height": height, "width": width}, crop_size={"height": height, "width": width})


def image_size(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width) that a tower was made for."""
    size = vision_config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def class_tokens(vision_config: PreTrainedConfig) -> int:
    """Tokens before the patches.

    Raises:
        ValueError: an unknown kind of tower.
    """
    if vision_config.model_type not in CLASS_TOKENS:
        raise ValueError(f"vision tower {vision_config.model_type!r}; allowed: {', '.join(sorted(CLASS_TOKENS))}")
    return CLASS_TOKENS[vision_config.model_type]


def num_image_tokens(processor: LlavaProcessor, height: int, width: int) -> int:
    """Placeholders for an image whose processed size is height x width pixels."""
    patches = (height // processor.patch_size) * (width // processor.patch_size)
    total = patches + processor.num_additional_image_tokens
    return total - 1 if processor.vision_feature_select_strategy == "default" else total


def load_processor(folder: str | Path) -> LlavaProcessor:
    """A processor that was saved beside a model or in a run's folder.

    Raises:
        ValueError: there is none in the folder.
    """
    if not any((Path(folder) / name).is_file() for name in PROCESSOR_FILES):
        raise ValueError(
            f"{folder}: no processor ({' or '.join(PROCESSOR_FILES)}); a model's folder holds it beside the weights, a "
            "run's folder in processor/, beside checkpoints/"
        )
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return LlavaProcessor.from_pretrained(folder, image_processor=image_processor, tokenizer=tokenizer)
