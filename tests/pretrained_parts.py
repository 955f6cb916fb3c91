"""A tiny run whose tower and language model are read from folders, as real runs' are, and stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe_lvlm.models.processor import default_image_processor
from tests.tiny_models import shake
from tests.tiny_run import tiny_recipe, write_run_inputs

ADAPTER = {"kind": "mocle", "gating": "dataset", "num_clusters": 2, "embedding_width": 6, "num_experts": 2, "rank": 3}


def write_parts(folder: Path, *, vocab_size: int = 32, dtype: torch.dtype = torch.float32) -> None:
    """`clip`, a whole CLIP with both its towers, and `llama`, in several shards."""
    clip = CLIPConfig(
        vision_config={
            "image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        text_config={
            "vocab_size": 30, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2,
        },
        projection_dim=16,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(5)
    models: tuple[PreTrainedModel, ...] = (CLIPModel(clip), LlamaForCausalLM(llama))
    for seed, (name, model) in enumerate(zip(("clip", "llama"), models, strict=True)):
        shake(model, scale=0.1, seed=seed)
        model.to(dtype).save_pretrained(folder / name, max_shard_size="20KB" if name == "llama" else "5GB")
    default_image_processor(clip.vision_config).save_pretrained(folder / "clip")


def parts_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Adapters and projector trained on parts that stay as they are. changes: top-level keys."""
    recipe = tiny_recipe(folder)
    recipe["model"] |= {
        "vision_tower": {"from_pretrained": str(folder / "clip")},
        "language_model": {"from_pretrained": str(folder / "llama")},
        "adapter": ADAPTER,
    }
    recipe["train"] |= {"checkpoint": {"every": 1, "keep_last": 100}}
    recipe["data"] |= {"mixture": [{"path": "train.json", "name": "one"}, {"path": "train.json", "name": "two"}]}
    recipe["stages"] = [
        {"name": "adapt", "adapt": True, "train": ["adapter", "connector"], "steps": 4, "micro_batch": 2,
         "global_batch": 8, "learning_rate": 1.0e-2},
    ]  # fmt: skip
    return recipe | changes


def write_parts_inputs(folder: Path, **changes: Any) -> Path:
    """Data, tokenizer, parts and recipe.yaml; the recipe's path."""
    path = write_run_inputs(folder)
    write_parts(folder)
    path.write_text(yaml.safe_dump(parts_recipe(folder, **changes), sort_keys=False))
    return path
