"""Masks on the patch grid, and the area under the ROC curve against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from moe_lvlm.analysis.foreground import area_under_curve, foreground_fraction, patch_grid, pool_patches


def test_foreground_is_averaged_over_patches() -> None:
    mask = np.array([[255, 255, 0, 0], [255, 255, 0, 255], [0, 0, 255, 0], [0, 0, 255, 0]], dtype=np.uint8)
    fraction = foreground_fraction(Image.fromarray(mask), height=4, width=4, patch_size=2)
    assert fraction.tolist() == [1.0, 0.25, 0.0, 0.5]


def test_mask_is_brought_to_the_processed_size() -> None:
    mask = np.zeros((8, 12), dtype=np.uint8)
    mask[:, 6:] = 255
    fraction = foreground_fraction(Image.fromarray(mask), height=4, width=8, patch_size=2)
    assert fraction.reshape(2, 4).tolist() == [[0.0, 0.0, 1.0, 1.0]] * 2


def test_object_ids_palettes_and_colours_are_foreground() -> None:
    ids = Image.fromarray(np.array([[0, 1], [2, 0]], dtype=np.uint8))
    palette = Image.frombytes("P", (2, 2), ids.tobytes())
    palette.putpalette([0, 0, 0] * 256)
    colours = Image.new("RGB", (2, 2))
    colours.putpixel((1, 0), (0, 0, 9))
    colours.putpixel((0, 1), (7, 0, 0))
    for mask in (ids, palette, colours):
        assert foreground_fraction(mask, height=2, width=2, patch_size=1).tolist() == [0.0, 1.0, 1.0, 0.0]


def test_rest_of_an_image_has_no_patch() -> None:
    assert patch_grid(15, 29, 7) == (2, 4)
    assert pool_patches(np.arange(15.0).reshape(3, 5), 2).tolist() == [3.0, 5.0]


def test_unfit_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="mask of mode RGBA; allowed: 1, L"):
        foreground_fraction(Image.new("RGBA", (4, 4)), height=4, width=4, patch_size=2)
    with pytest.raises(ValueError, match="4 x 4 px holds no patch of 8 px"):
        foreground_fraction(Image.new("L", (4, 4)), height=4, width=4, patch_size=8)


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
