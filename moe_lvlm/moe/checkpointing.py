"""Gradient checkpointing of layers with routers: which kind they allow, and which layers come first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moe_lvlm.moe.layer import MoELayer


def refuse_reentrant(checkpoint: Any) -> None:
    """Raise ValueError where a layer would be checkpointed by the reentrant kind. checkpoint: the layer's function."""
    if getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
        raise ValueError(
            "gradient checkpointing: use_reentrant=True loses gradients of the routers; "
            'allowed: gradient_checkpointing_enable({"use_reentrant": False})'
        )


def choose_layers(layers: Sequence[nn.Module], num_layers: int) -> list[int]:
    """Which layers are computed again where not all are: those without experts first, from the last to the first. For the
    memory that they free these cost least to compute again (a token passes one FFN there, not its k experts), and no
    exchange of rows is repeated.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    if not 1 <= num_layers <= len(layers):
        raise ValueError(
            f"train.gradient_checkpointing: {num_layers}; allowed: true, false, or 1 to {len(layers)}, the layers of the "
            "language model"
        )

    def comes_late(index: int) -> tuple[bool, int]:
        return any(isinstance(module, MoELayer) for module in layers[index].modules()), -index

    return sorted(sorted(range(len(layers)), key=comes_late)[:num_layers])
