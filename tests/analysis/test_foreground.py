"""Masks on the patch grid, and the area under the ROC curve against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from moe_lvlm.analysis.foreground import area_under_curve, patch_grid, pool_patches


def test_foreground_is_averaged_over_patches() -> None:
    mask = np.array([[1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0]], dtype=np.float32)
    assert pool_patches(mask, 2).tolist() == [1.0, 0.25, 0.0, 0.5]


def test_rest_of_an_image_has_no_patch() -> None:
    assert patch_grid(15, 29, 7) == (2, 4)
    assert pool_patches(np.arange(15.0).reshape(3, 5), 2).tolist() == [3.0, 5.0]


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="4 x 4 px holds no patch of 8 px"):
        pool_patches(np.zeros((4, 4)), 8)


@pytest.mark.parametrize("seed", range(20))
def test_area_under_curve_equals_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 60))
    score = random.integers(0, 8, size) / 8 if seed % 2 else random.random(size)
    positive = random.random(size) < 0.4
    positive[:2] = True, False
    assert area_under_curve(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)


@pytest.mark.parametrize("value", [True, False])
def test_area_under_curve_needs_both_classes(value: bool) -> None:
    assert area_under_curve(np.arange(3.0), np.full(3, value)) is None
