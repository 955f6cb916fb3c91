"""Example images with their tail tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_lvlm.analysis.examples import ExampleStore, displayable
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Site

SITE = Site("language_model", 2)


def add(store: ExampleStore, trace: RoutingTrace, **changes: object) -> None:
    values: dict = {
        "image_index": 0,
        "image": np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3),
        "grid": (3, 1),
        "key": "a/1",
        "question": "wo ist es? 猫",
        "answer": "",
        "prediction": "<script>\0",
        "foreground": np.array([0.1, 0.6, 1.0]),
    }
    store.add(trace, **(values | changes))


def test_round_trip(hand_trace: RoutingTrace, tmp_path: Path) -> None:
    store = ExampleStore()
    add(store, hand_trace)
    add(store, hand_trace, image_index=1, grid=(1, 2), foreground=None, key="b")
    store.to_npz(tmp_path / "examples.npz")
    first, second = ExampleStore.from_npz(tmp_path / "examples.npz")
    assert (first.key, first.question, first.answer, first.prediction) == ("a/1", "wo ist es? 猫", "", "<script>\0")
    assert first.grid == (3, 1)
    assert first.image.tolist() == np.arange(72, dtype=np.uint8).reshape(6, 4, 3).tolist()
    assert first.tail[SITE].tolist() == [True, False, False]
    assert first.foreground is not None
    assert first.foreground.tolist() == pytest.approx([0.1, 0.6, 1.0])
    assert second.foreground is None
    assert second.tail[SITE].tolist() == [True, False]


def test_full_store_takes_no_more(hand_trace: RoutingTrace) -> None:
    store = ExampleStore(limit=2)
    for key in "abc":
        add(store, hand_trace, key=key)
    assert store.is_full
    assert [example.key for example in store] == ["a", "b"]


def test_large_image_is_made_small(hand_trace: RoutingTrace) -> None:
    store = ExampleStore(max_pixels=50)
    add(store, hand_trace, image=np.zeros((100, 200, 3), dtype=np.uint8))
    assert next(iter(store)).image.shape == (25, 50, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"grid": (2, 2)}, r"a/1: .* allowed: \(4,\), a grid of 2 x 2"), ({"foreground": np.zeros(2)}, "foreground")],
)
def test_grid_that_is_not_the_images_is_refused(hand_trace: RoutingTrace, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add(ExampleStore(), hand_trace, **changes)


def test_displayable_undoes_the_normalisation() -> None:
    image = np.array([[[0, 128, 255], [10, 20, 30]]], dtype=np.uint8)
    mean, std = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
    pixels = torch.tensor((image / 255 - np.array(mean)) / np.array(std), dtype=torch.float32).permute(2, 0, 1)
    assert displayable(pixels, mean=mean, std=std).tolist() == image.tolist()
