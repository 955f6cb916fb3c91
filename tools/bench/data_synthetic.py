"""Data in the likeness of LLaVA's, made on the spot: photographs' size, noise and bytes, conversations' lengths, a BPE
tokenizer, CLIP-L/336's image processor, and a feature cache of the right shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from moe_lvlm.data.feature_shards import ShardImage, write_index, write_shard
from moe_lvlm.estimation.samples import SampleLengths

VISUAL_TOKENS, FEATURE_WIDTH, SIDE = 576, 1024, 336  # CLIP ViT-L/14 at 336 pixels
_WIDTH, _HEIGHT, _QUALITY = 640, 480, 85
_SYLLABLES = ("ba", "de", "fo", "gri", "ka", "lun", "me", "nor", "pi", "quo", "ra", "sten", "ti", "vul", "wes", "zo")
_TEMPLATE_WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: ASSISTANT:"
)
_TEMPLATE_TOKENS = 40  # of a conversation's texts, about
_SHARD = 16


def write_data(folder: Path, *, num_images: int, num_records: int, seed: int) -> list[str]:
    """Write all of it into a folder; the overrides by which the recipe of `sizes/stablelm.yaml` reads it.

    num_images: that the records share.
    """
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for index in range(num_images):
        _picture(generator).save(folder / "images" / f"{index}.jpg", quality=_QUALITY)
    vocabulary = _words(generator, 4000)
    texts = [" ".join(generator.choice(vocabulary, 200)) for _ in range(500)]
    # every conversation begins with the template's own words, which a real tokenizer knows
    tokenizer = _write_tokenizer(folder / "tokenizer", [*texts, *[_TEMPLATE_WORDS] * 500])
    tokens_a_word = sum(len(ids) for ids in tokenizer(texts[:50])["input_ids"]) / (50 * 200)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder / "image_processor")
    sizes = SampleLengths().draw(num_records, VISUAL_TOKENS, generator)
    records = _records(generator, vocabulary, sizes, num_images=num_images, tokens_a_word=tokens_a_word)
    (folder / "train.json").write_text(json.dumps(list(records)))
    _write_features(folder, num_images=num_images, seed=seed)
    return [
        f"data.image_root={folder}",
        "data.mixture=[{path: train.json}]",
        "data.chat_template=vicuna_v1",
        f"model.tokenizer={folder / 'tokenizer'}",
        f"model.image_processor={folder / 'image_processor'}",
        "stages.0.micro_batch=16",
        "stages.0.global_batch=128",
    ]


def _picture(generator: np.random.Generator) -> Image.Image:
    """Gradients, blocks and grain: about as many bytes as COCO's photographs have."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    slopes = generator.uniform(0.05, 0.25, (3, 2))
    smooth = np.stack([x * across + y * down for across, down in slopes], axis=-1)
    blocks = generator.normal(0, 25, (_HEIGHT // 20, _WIDTH // 20, 3)).repeat(20, axis=0).repeat(20, axis=1)
    grain = generator.normal(0, 9, (_HEIGHT, _WIDTH, 3))
    return Image.fromarray(np.clip(smooth + blocks + grain, 0, 255).astype(np.uint8))


def _words(generator: np.random.Generator, count: int) -> list[str]:
    sizes = generator.integers(1, 4, size=count)
    return ["".join(generator.choice(_SYLLABLES, size=int(size))) for size in sizes]


def _write_tokenizer(folder: Path, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as most LLMs' tokenizers are, trained on such texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def _records(
    generator: np.random.Generator,
    vocabulary: list[str],
    sizes: np.ndarray,
    *,
    num_images: int,
    tokens_a_word: float,
) -> Iterator[dict[str, object]]:
    """Questions and answers; long texts have more turns. sizes: [records, 2], tokens and images of each."""
    for index, (tokens, images) in enumerate(sizes.tolist()):
        left = max(2, round((tokens - images * VISUAL_TOKENS - _TEMPLATE_TOKENS) / tokens_a_word))
        turns: list[dict[str, str]] = []
        while left > 0 or not turns:
            size = max(1, min(left, 60) // 2)
            for speaker in ("human", "gpt"):
                turns.append({"from": speaker, "value": " ".join(generator.choice(vocabulary, size))})
            left -= 2 * size
        record: dict[str, object] = {"id": str(index), "conversations": turns}
        if images:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = f"images/{int(generator.integers(num_images))}.jpg"
        yield record


def _write_features(folder: Path, *, num_images: int, seed: int) -> None:
    """Random features in the place of a tower's."""
    generator = torch.Generator().manual_seed(seed)
    (folder / "features").mkdir()
    names = [f"images/{index}.jpg" for index in range(num_images)]
    for start in range(0, num_images, _SHARD):
        images = [ShardImage(name, (folder / name).stat().st_size) for name in names[start : start + _SHARD]]
        features = torch.randn(len(images), VISUAL_TOKENS, FEATURE_WIDTH, generator=generator).to(torch.bfloat16)
        write_shard(folder / "features", images, features, fingerprint={"made by": "a benchmark, at random"})
    write_index(folder / "features")
