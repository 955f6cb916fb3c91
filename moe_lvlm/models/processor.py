"""The processor: tokenizer, image processor, and how many placeholders an image takes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeAlias

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    InstructBlipProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_backends import PilBackend

from moe_lvlm.config.connector import QFormerConnectorSettings
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.images import image_size

logger = logging.getLogger(__name__)

# One of them is in every folder to which a processor was saved; older ones have the second.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
QFORMER_TOKENIZER = "qformer_tokenizer"
# Tokens that a tower puts before those of the patches.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}


class QFormerProcessor(InstructBlipProcessor):
    """InstructBLIP's processor, which also tells the id of the image token. Its files are InstructBLIP's."""

    @property
    def image_token_id(self) -> int:
        """The token that stands for each of an image's visual tokens."""
        return int(self.tokenizer.convert_tokens_to_ids(str(self.image_token)))


Processor: TypeAlias = LlavaProcessor | QFormerProcessor
"""tokenizer, image_processor, image_token, image_token_id; a Q-Former's has qformer_tokenizer and num_query_tokens too."""


def build_processor(settings: ModelSettings, vision_config: PreTrainedConfig) -> LlavaProcessor:
    """Tokenizer and image processor of a model made of parts, with LLaVA's projector.

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


def with_qformer(
    processor: LlavaProcessor, connector: QFormerConnectorSettings, *, num_queries: int
) -> QFormerProcessor:
    """The processor for the same parts around a Q-Former.

    Raises:
        ValueError: no tokenizer for the Q-Former's text, or another image token than InstructBLIP's.
    """
    if processor.image_token != "<image>":
        raise ValueError(f"model.image_token: {processor.image_token!r}; allowed beside a Q-Former: '<image>'")
    assert connector.qformer is not None
    tokenizer = load_qformer_tokenizer(
        connector, None if connector.qformer.from_pretrained is None else resolve(connector.qformer.from_pretrained)
    )
    return QFormerProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        qformer_tokenizer=tokenizer,
        num_query_tokens=num_queries,
    )


def load_qformer_tokenizer(connector: QFormerConnectorSettings | None, folder: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a Q-Former's text, cut at the connector's `max_text_length`.

    folder: of an InstructBLIP, which brings one; the connector's `tokenizer` and `text_from` go before it. connector:
        None where a recipe leaves the connector to the folder.

    Raises:
        ValueError: there is none.
    """
    places: list[Path] = []
    if connector is not None:
        places += [resolve(connector.tokenizer)] if connector.tokenizer is not None else []
        places += [resolve(connector.text_from) / QFORMER_TOKENIZER] if connector.text_from is not None else []
    if folder is not None and (folder / QFORMER_TOKENIZER).is_dir():
        places.append(folder / QFORMER_TOKENIZER)
    if not places:
        raise ValueError(
            "model.connector.tokenizer: needed; allowed: a folder or hub name with the tokenizer of the Q-Former's text "
            f"(an InstructBLIP folder brings its own in {QFORMER_TOKENIZER}/; {folder or 'no folder'} does not)"
        )
    tokenizer = AutoTokenizer.from_pretrained(places[0], use_fast=True)
    if connector is not None:
        tokenizer.model_max_length = connector.max_text_length
    return tokenizer


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


def class_tokens(vision_config: PreTrainedConfig) -> int:
    """Tokens before the patches.

    Raises:
        ValueError: an unknown kind of tower.
    """
    if vision_config.model_type not in CLASS_TOKENS:
        raise ValueError(f"vision tower {vision_config.model_type!r}; allowed: {', '.join(sorted(CLASS_TOKENS))}")
    return CLASS_TOKENS[vision_config.model_type]


def num_image_tokens(processor: Processor, height: int, width: int) -> int:
    """Placeholders for an image whose processed size is height x width pixels: one a patch, or one a query."""
    if isinstance(processor, QFormerProcessor):
        return int(processor.num_query_tokens)
    patches = (height // processor.patch_size) * (width // processor.patch_size)
    total = patches + processor.num_additional_image_tokens
    return total - 1 if processor.vision_feature_select_strategy == "default" else total


def load_processor(folder: str | Path) -> Processor:
    """A processor that was saved beside a model or in a run's folder.

    Raises:
        ValueError: there is none in the folder.
    """
    path = Path(folder)
    if not any((path / name).is_file() for name in PROCESSOR_FILES):
        raise ValueError(
            f"{folder}: no processor ({' or '.join(PROCESSOR_FILES)}); a model's folder holds it beside the weights, a "
            "run's folder in processor/, beside checkpoints/"
        )
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (path / QFORMER_TOKENIZER).is_dir():
        return QFormerProcessor.from_pretrained(
            folder,
            image_processor=image_processor,
            tokenizer=tokenizer,
            qformer_tokenizer=AutoTokenizer.from_pretrained(path / QFORMER_TOKENIZER),
        )
    return LlavaProcessor.from_pretrained(folder, image_processor=image_processor, tokenizer=tokenizer)


def load_blip_processor(folder: Path, connector: QFormerConnectorSettings | None) -> QFormerProcessor:
    """The processor of an InstructBLIP or BLIP-2 folder.

    Raises:
        ValueError: no tokenizer for the Q-Former's text.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    prepare_tokenizer(tokenizer, "<image>")
    return QFormerProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer=tokenizer,
        qformer_tokenizer=load_qformer_tokenizer(connector, folder),
        num_query_tokens=AutoConfig.from_pretrained(folder).num_query_tokens,
    )
