"""A small real tokenizer and processor, and LLaVA files on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from moe_lvlm.data.llava_json import read_records
from moe_lvlm.data.mixture import Source
from moe_lvlm.data.sample import SampleBuilder
from moe_lvlm.data.templates import BUILTIN_TEMPLATES, build_template

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "what is in the image? a red cat sits on the mat. user assistant",
    "describe it briefly: two dogs",
    "é ü 猫",
] * 3


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's and Qwen's, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=BUILTIN_TEMPLATES["chatml"],
    )


def image_processor() -> CLIPImageProcessorPil:
    size = {"height": 16, "width": 16}
    return CLIPImageProcessorPil(size=size, crop_size=size)


def num_image_tokens(processor: LlavaProcessor, height: int, width: int) -> int:
    """One token for each 8 x 8 patch: 4 for 16 x 16."""
    return (height // 8) * (width // 8)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=image_processor(), tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default"
    )


MakeBuilder = Callable[..., SampleBuilder]


@pytest.fixture(scope="session")
def make_builder(processor: LlavaProcessor) -> MakeBuilder:
    """Called with kind, chat_template, max_length: a builder on the small processor."""

    def make(
        kind: Literal["plain", "chat"] = "chat", chat_template: str = "tokenizer", max_length: int = 512
    ) -> SampleBuilder:
        template = build_template(kind, chat_template, processor.tokenizer, processor.image_token)
        return SampleBuilder(processor, template, num_image_tokens=num_image_tokens, max_length=max_length)

    return make


def conversation(*texts: str) -> list[dict[str, str]]:
    """Turns in a record's layout, human first."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


MakeSource = Callable[..., Source]


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """Called with records and a name: a source on disk, with images red.png and wide.png beside it."""
    for name, size in (("red.png", (20, 20)), ("wide.png", (40, 10))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / name)

    def make(records: Sequence[object], name: str = "a") -> Source:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(list(records)))
        return Source(name, read_records(path), tmp_path)

    return make
