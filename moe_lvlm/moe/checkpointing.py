"""Which kind of gradient checkpointing layers with routers allow."""

from __future__ import annotations

from typing import Any


def refuse_reentrant(checkpoint: Any) -> None:
    """Raise ValueError where a layer would be checkpointed by the reentrant kind. checkpoint: the layer's function."""
    if getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
        raise ValueError(
            "gradient checkpointing: use_reentrant=True loses gradients of the routers; "
            'allowed: gradient_checkpointing_enable({"use_reentrant": False})'
        )
