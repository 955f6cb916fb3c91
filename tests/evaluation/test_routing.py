"""Masks on the grid of visual tokens, and prompts in batches, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, PreTrainedModel

from moe_lvlm.evaluation.routing import Answered, RoutingCollector, foreground_of, normalisation

from .conftest import IMAGE_TOKENS, TinyPrompt


def processor_of(**keys: Any) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(crop_size={"height": 8, "width": 8}, **keys)


def test_a_mask_is_stretched_like_its_image() -> None:
    # 16 x 8 pixels become 8 x 8: each patch of 4 x 4 shows 8 rows and 4 columns of the mask
    mask = np.zeros((16, 8), dtype=bool)
    mask[:4, :4] = True
    mask[8:, 4:6] = True
    found = foreground_of(mask, processor_of(size={"height": 8, "width": 8}), patch_size=4)
    assert found.tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5], abs=1e-3)


def test_a_mask_is_cropped_like_its_image() -> None:
    # 16 x 32 becomes 8 x 16, of which the middle 8 columns stay: columns 8 to 24 of the mask
    mask = np.zeros((16, 32), dtype=bool)
    mask[:, :8] = True
    mask[:8, 8:16] = True
    found = foreground_of(mask, processor_of(size={"shortest_edge": 8}), patch_size=4)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-3)


def test_normalisation_is_the_image_processor_s() -> None:
    half = processor_of(size={"shortest_edge": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3)
    assert normalisation(half) == {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    none = processor_of(size={"shortest_edge": 8}, do_normalize=False)
    assert normalisation(none) == {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_routing_depends_neither_on_batches_nor_on_their_padding(
    moe_model: PreTrainedModel, processor: Any, prompts: list[TinyPrompt]
) -> None:
    found = []
    for batch_size in (1, 3):
        collector = RoutingCollector(moe_model, processor)
        collector.update([answered(prompt) for prompt in prompts], batch_size=batch_size)
        found.append({site: (part.load.tolist(), part.tokens.tolist()) for site, part in collector.statistics.items()})
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_a_foreground_of_another_grid_is_refused(
    moe_model: PreTrainedModel, processor: Any, prompts: list[TinyPrompt]
) -> None:
    collector = RoutingCollector(moe_model, processor)
    wrong = answered(prompts[0], np.ones(IMAGE_TOKENS + 1, dtype=np.float32))
    with pytest.raises(ValueError, match="foreground of image 0"):
        collector.update([wrong], batch_size=1)


def answered(prompt: TinyPrompt, share: np.ndarray | None = None) -> Answered:
    num_images = 0 if prompt.pixel_values is None else len(prompt.pixel_values)
    return Answered(
        key=str(torch.sum(prompt.input_ids).item()),
        question="what ?",
        answer="cat",
        prediction="dog",
        prompt=prompt,
        foreground=[share] * num_images,
    )
