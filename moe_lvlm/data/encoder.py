"""The sentence encoder behind clusters of instructions, loaded where it is needed.

N texts   W width of an embedding
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""LTDR's and MoCLE's, 384 wide."""
ENCODER_VARIABLE = "MOE_LVLM_ENCODER"
"""Environment variable: where the encoder lies on this machine, in place of the name that a table of clusters holds."""

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to embeddings [N, W]."""


def load_encoder(name: str, *, device: str | None = None, batch_size: int = 64) -> Encode:
    """A sentence-transformers model: a folder, or a hub name.

    device: None takes a GPU if there is one.

    Raises:
        ValueError: sentence-transformers is not installed, or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"encoder {name!r}: sentence-transformers cannot be imported ({error}); install it with `pip "
            "install sentence-transformers` (moe-lvlm's extra `clusters`)"
        ) from error
    try:
        model: Any = SentenceTransformer(name, device=device)
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:  # the last two: no such device
        reason = str(error).strip().partition("\n")[0] + ("" if device is None else f"; device {device}")
        raise ValueError(
            f"encoder {name!r}: cannot be loaded ({reason}); allowed: the folder of a sentence-transformers model, or "
            f"a hub name that can be reached or is cached. {ENCODER_VARIABLE}=<folder> says where it lies here"
        ) from error

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        embeddings_NW = model.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(embeddings_NW, dtype=np.float32)

    return encode
