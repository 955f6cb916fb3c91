"""A run of seconds: a synthetic dataset, a tokenizer, and a recipe of two stages, dense and sparse."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COLORS = {"red": (210, 30, 30), "green": (30, 170, 50), "blue": (30, 50, 210), "black": (20, 20, 20)}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
WORDS = (*COLORS, "which", "colour", "?", "say", "yes", "no")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'user' %} <user> {{ message['content'] }} <assistant>"
    "{% else %} {{ message['content'] }} </s>{% endif %}"
    "{% endfor %}"
)
NUM_RECORDS = 24
DENSE_STEPS, SPARSE_STEPS = 3, 5


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the run is spread, and what it computes in. background: checkpoints are written beside training."""

    world: int = 2
    expert_parallel: int = 2
    zero: int = 2
    precision: str = "fp32"
    background: bool = False


def write_inputs(folder: Path, topology: Topology) -> Path:
    """Dataset, tokenizer and recipe.yaml in a new folder; the recipe's path."""
    folder.mkdir(parents=True)
    _write_tokenizer(folder / "tokenizer")
    _write_data(folder)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(_recipe(folder, topology), sort_keys=False), encoding="utf-8")
    return path


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def _write_data(folder: Path) -> None:
    """One image a record but for every fourth, which is text only."""
    from PIL import Image

    records: list[dict[str, Any]] = []
    for number in range(NUM_RECORDS):
        if number % 4 == 3:
            records.append({"id": f"text-{number}", "conversations": _conversation("say yes", "yes")})
            continue
        name, color = list(COLORS.items())[number % len(COLORS)]
        Image.new("RGB", (16, 16), color).save(folder / f"{number}.png")
        turns = _conversation("<image>\nwhich colour ?", name)
        records.append({"id": f"image-{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _recipe(folder: Path, topology: Topology) -> dict[str, Any]:
    """A checkpoint after every step, the last two kept, and each stage's third and last."""
    batch = {"micro_batch": 2, "global_batch": 2 * topology.world * max(1, 4 // topology.world)}
    tower = {
        "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    language_model = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return {
        "name": "torture",
        "model": {
            "vision_tower": {"from_config": tower},
            "language_model": {"from_config": language_model},
            "tokenizer": str(folder / "tokenizer"),
        },
        "moe": {"num_experts": 4, "top_k": 2, "router": {"kind": "ltdr"}},
        "data": {"image_root": str(folder), "mixture": [{"path": "records.json"}], "max_length": 32},
        "train": {
            "precision": topology.precision,
            "log_every": 1,
            "checkpoint": {"every": 1, "keep_last": 2, "keep_every": 3, "background": topology.background},
        },
        "parallel": {"expert_parallel_size": topology.expert_parallel, "deepspeed": f"zero{topology.zero}"},
        "stages": [
            {"name": "tune", "train": ["connector", "language_model"], "steps": DENSE_STEPS, **batch,
             "learning_rate": 1.0e-2},
            {"name": "sparse", "upcycle": True, "train": ["moe", "connector"], "steps": SPARSE_STEPS, **batch,
             "learning_rate": 1.0e-2},
        ],
    }  # fmt: skip
