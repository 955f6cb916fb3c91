"""The routing context derived from token ids."""

from __future__ import annotations

import pytest
import torch

from moe_lvlm.models.context import derive_context
from moe_lvlm.routing.types import Modality, RoutingContext

X = 9  # the image token
PAD, LANG, VIS = int(Modality.PADDING), int(Modality.LANGUAGE), int(Modality.VISION)


def derive(
    rows: list[list[int]], mask: list[list[int]] | None = None, *, num_images: int, is_cached: bool = False
) -> RoutingContext:
    return derive_context(
        torch.tensor(rows),
        attention_mask=None if mask is None else torch.tensor(mask),
        image_token_id=X,
        num_images=num_images,
        is_cached=is_cached,
    )


def test_images_samples_and_padding() -> None:
    context = derive(
        [[1, X, X, 5, X, X, 6], [1, 5, 6, 0, 0, 0, 0], [1, X, X, 7, 8, 0, 0]],
        [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]],
        num_images=3,
    )
    assert context.modality_BS.tolist() == [
        [LANG, VIS, VIS, LANG, VIS, VIS, LANG],
        [LANG, LANG, LANG, PAD, PAD, PAD, PAD],
        [LANG, VIS, VIS, LANG, LANG, PAD, PAD],
    ]
    assert context.image_BS.tolist() == [[-1, 0, 0, -1, 1, 1, -1], [-1] * 7, [-1, 2, 2, -1, -1, -1, -1]]
    assert context.sample_BS.tolist() == [[0] * 7, [1, 1, 1, -1, -1, -1, -1], [2, 2, 2, 2, 2, -1, -1]]
    assert context.modality_BS.dtype == torch.int8
    assert context.image_BS.dtype == context.sample_BS.dtype == torch.int32


def test_left_padding() -> None:
    context = derive([[0, 0, 1, X, X], [1, X, X, 5, 6]], [[0, 0, 1, 1, 1], [1] * 5], num_images=2)
    assert context.modality_BS.tolist() == [[PAD, PAD, LANG, VIS, VIS], [LANG, VIS, VIS, LANG, LANG]]
    assert context.image_BS.tolist() == [[-1, -1, -1, 0, 0], [-1, 1, 1, -1, -1]]


def test_adjacent_images_are_told_apart() -> None:
    assert derive([[X, X, X, X, 5]], num_images=2).image_BS.tolist() == [[0, 0, 1, 1, -1]]


def test_without_a_mask_there_is_no_padding() -> None:
    assert derive([[0, 1, 5]], num_images=0).modality_BS.tolist() == [[LANG] * 3]


def test_a_generated_image_token_in_a_cached_step_is_language() -> None:
    context = derive([[X], [4]], [[0, 1, 1, 1], [1, 1, 1, 1]], num_images=0, is_cached=True)
    assert context.modality_BS.tolist() == [[LANG], [LANG]]
    assert context.image_BS.tolist() == [[-1], [-1]]


def test_a_mask_that_covers_the_past_is_read_at_its_end() -> None:
    # two tokens of this call, four of the past; the second sample is padding at this call's first place
    context = derive([[5, 6], [0, 6]], [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]], num_images=0)
    assert context.modality_BS.tolist() == [[LANG, LANG], [PAD, LANG]]


def test_an_image_token_under_the_mask_is_padding() -> None:
    context = derive([[X, 1, X, X]], [[0, 1, 1, 1]], num_images=1)
    assert context.modality_BS.tolist() == [[PAD, LANG, VIS, VIS]]
    assert context.image_BS.tolist() == [[-1, -1, 0, 0]]


def test_boolean_mask() -> None:
    mask = torch.tensor([[True, False]])
    context = derive_context(torch.tensor([[5, 0]]), attention_mask=mask, image_token_id=X, num_images=0)
    assert context.modality_BS.tolist() == [[LANG, PAD]]


def test_a_four_dimensional_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 2, 2\); allowed: \[1, at least 2\]"):
        derive_context(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2), image_token_id=X, num_images=0)


@pytest.mark.parametrize("mask", [[[1, 1]], [[1]], [[1] * 3, [1] * 3]])
def test_a_mask_that_does_not_fit_is_refused(mask: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="attention_mask has shape"):
        derive([[5, 6, 7]], mask, num_images=0)


def test_an_image_token_without_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image tokens, but no pixel_values"):
        derive([[1, X, X, 5]], num_images=0)


def test_tokens_that_do_not_divide_among_the_images() -> None:
    with pytest.raises(ValueError, match="3 image tokens in input_ids do not divide among 2 images"):
        derive([[X, X, X]], num_images=2)
