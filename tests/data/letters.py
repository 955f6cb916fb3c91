"""An encoder that needs no weights: how often each letter occurs. For tests of what is done with embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WIDTH = 26


def encode(texts: Sequence[str]) -> NDArray[np.float32]:
    """[texts, 26], each of length 1 (0 without letters)."""
    counts = np.array(
        [[text.lower().count(chr(97 + letter)) for letter in range(WIDTH)] for text in texts], dtype=float
    )
    return (counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)).astype(np.float32)
