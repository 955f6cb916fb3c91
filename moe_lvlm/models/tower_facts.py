"""What tells one vision tower from another. A module of its own: models that are exported with their code need no hash."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from transformers import PreTrainedModel

# Of a tower's configuration, what changes its features and no weight.
_CONFIG = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "image_size", "patch_size")


def tower_facts(tower: PreTrainedModel) -> dict[str, Any]:
    """Plain values, other ones for a tower that may give other features: its weights as xxh3-128, their type, and what its
    configuration says besides."""
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(tower.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    facts = {name: getattr(tower.config, name, None) for name in _CONFIG}
    return facts | {"precision": str(next(tower.parameters()).dtype), "weights": digest.hexdigest()}
