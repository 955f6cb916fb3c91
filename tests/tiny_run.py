"""A run small enough for tests: a dataset on disk, a tokenizer, and a recipe that trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)

from moe_lvlm.models.processor import default_image_processor
from tests.tiny_models import shake, tiny_blip_config

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user> ' + m['content'] + ' <assistant> ' }}"
    "{% else %}{{ m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)


def write_tokenizer(folder: Path) -> None:
    """A word tokenizer with a chat template."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>"]
    words = [*COLORS, "what", "color", "is", "it", "?", "say", "hello", "word"]
    vocabulary = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_data(folder: Path, *, count: int = 40, text_only_every: int = 0, seed: int = 0) -> None:
    """Images of one colour each, and questions about it; every n-th record has no image if asked for."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for index in range(count):
        color = list(COLORS)[rng.integers(len(COLORS))]
        if text_only_every and index % text_only_every == 0:
            turns = [("say hello", "hello"), ("say word", "word hello")]
            records.append({"id": f"{index}", "conversations": conversation(turns)})
            continue
        pixels = np.clip(np.array(COLORS[color]) + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        turns = [("<image>\nwhat color is it ?", color)]
        if rng.random() < 0.5:
            turns.append(("say hello", "hello"))
        records.append({"id": f"{index}", "image": f"images/{index}.png", "conversations": conversation(turns)})
    (folder / "train.json").write_text(json.dumps(records))


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Question and answer pairs in LLaVA's form."""
    return [
        {"from": speaker, "value": value}
        for question, answer in turns
        for speaker, value in (("human", question), ("gpt", answer))
    ]


def tiny_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two stages (dense, then sparse) on the data in `folder`, as YAML would give them. changes: top-level keys."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "model": {
            "vision_tower": {
                "from_config": {
                    "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "hidden_size": 32,
                    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                }
            },
            "language_model": {
                "from_config": {
                    "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48,
                    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "max_position_embeddings": 128,
                }
            },
            "tokenizer": str(folder / "tokenizer"),
        },
        "moe": {"num_experts": 4, "top_k": 2, "router": {"kind": "ltdr"}, "balance": {"on": ["language"]}},
        "data": {"image_root": str(folder), "mixture": [{"path": "train.json"}], "max_length": 64},
        "train": {"precision": "fp32", "log_every": 1, "checkpoint": {"every": 2, "keep_last": 2}},
        "parallel": {"expert_parallel_size": 1, "deepspeed": "zero2"},
        "stages": [
            {"name": "tune", "train": ["connector", "language_model"], "steps": 3, "micro_batch": 2,
             "global_batch": 8, "learning_rate": 1.0e-2},
            {"name": "sparse", "upcycle": True, "train": ["moe"], "steps": 5, "micro_batch": 2,
             "global_batch": 8, "learning_rate": 1.0e-2},
        ],
    }  # fmt: skip
    return recipe | changes


def write_run_inputs(folder: Path, **changes: Any) -> Path:
    """Dataset, tokenizer and recipe.yaml; the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    write_data(folder, text_only_every=5)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, **changes), sort_keys=False))
    return path


def write_words(folder: Path) -> None:
    """A word tokenizer for a Q-Former's text, which puts [CLS] first by itself."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *COLORS, "what", "color", "is", "it", "?", "say", "hello", "word"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder)


def write_instructblip(folder: Path, text: str = "llama") -> None:
    """A tiny InstructBLIP with its processor, in the published layout. text: of `BLIP_TEXT_CONFIGS`."""
    write_tokenizer(folder)
    write_words(folder / "qformer_tokenizer")
    torch.manual_seed(5)
    config = tiny_blip_config(text)
    config.image_token_index = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>")
    model = InstructBlipForConditionalGeneration(config)
    shake(model, scale=0.1, seed=5)
    model.save_pretrained(folder)
    InstructBlipProcessor(
        image_processor=default_image_processor(config.vision_config),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        qformer_tokenizer=AutoTokenizer.from_pretrained(folder / "qformer_tokenizer"),
        num_query_tokens=config.num_query_tokens,
    ).save_pretrained(folder)


def qmoe_recipe(folder: Path, text: str = "llama", **changes: Any) -> dict[str, Any]:
    """A Q-MoE begun from an InstructBLIP folder, on one question an image, as YAML would give it."""
    return {
        "name": "tiny-qmoe",
        "output_dir": str(folder / "run"),
        "model": {
            "from_pretrained": str(folder / f"instructblip-{text}"),
            "connector": {"kind": "qmoe", "experts": {"num_layers": 2, "importance_coefficient": 0.1}},
        },
        "data": {"image_root": str(folder), "mixture": [{"path": "questions.json"}], "template": "instruct"},
        "train": {"precision": "fp32", "log_every": 1, "checkpoint": {"every": 1, "keep_last": 100}},
        "parallel": {"deepspeed": "zero2"},
        "stages": [
            {"name": "tune", "train": ["connector"], "steps": 5, "micro_batch": 4, "global_batch": 8,
             "learning_rate": 1.0e-3},
        ],
        "evaluation": {"tasks": [{"name": "colors", "path": "questions.json", "max_new_tokens": 3}], "batch_size": 8},
    } | changes  # fmt: skip


def write_qmoe_inputs(folder: Path, text: str = "llama", **changes: Any) -> Path:
    """Questions, an InstructBLIP and recipe.yaml; the recipe's path. Some questions are about no image."""
    write_instructblip(folder / f"instructblip-{text}", text)
    write_data(folder, text_only_every=5)
    records = json.loads((folder / "train.json").read_text())
    for record in records:
        del record["conversations"][2:]
    (folder / "questions.json").write_text(json.dumps(records))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(qmoe_recipe(folder, text, **changes), sort_keys=False))
    return path
