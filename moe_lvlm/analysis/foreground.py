"""The foreground of an image on the grid of its visual tokens, and how well routing finds it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.floating]


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of an image in pixels. A rest at the right and the bottom has no patch.

    Raises:
        ValueError: the image is smaller than one patch.
    """
    rows, columns = height // patch_size, width // patch_size
    if not (rows and columns):
        raise ValueError(f"an image of {height} x {width} px holds no patch of {patch_size} px")
    return rows, columns


def pool_patches(share_HW: FloatArray, patch_size: int) -> NDArray[np.float32]:
    """Mean of every patch of a map in pixels: float32 [rows x columns], in patch order (row by row)."""
    height, width = share_HW.shape
    rows, columns = patch_grid(height, width, patch_size)
    cut = share_HW[: rows * patch_size, : columns * patch_size].astype(np.float32)
    return cut.reshape(rows, patch_size, columns, patch_size).mean(axis=(1, 3)).reshape(-1)


def area_under_curve(score: FloatArray, positive: BoolArray) -> float | None:
    """Area under the ROC curve of `score` for `positive`, by ranks (Mann-Whitney; a tie counts one half).

    None where all or no items are positive: there is no order to judge.
    """
    num_positive = int(positive.sum())
    num_negative = positive.size - num_positive
    if not (num_positive and num_negative):
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    mean_rank = last_rank - (counts - 1) / 2
    rank_sum = float(mean_rank[inverse][positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)
