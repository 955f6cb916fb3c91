"""The routing context of a batch that came without one, derived from its token ids.

B batch   S sequence (of this call)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision, Site


def derive_context(
    input_ids_BS: Tensor,
    *,
    attention_mask: Tensor | None,
    image_token_id: int,
    num_images: int,
    is_cached: bool = False,
    instruction_mask: Tensor | None = None,
    cluster_ids: Tensor | None = None,
    dataset_ids: Tensor | None = None,
    prompt: Mapping[Site, RoutingDecision] | None = None,
) -> RoutingContext:
    """Modality, image and sample of every position of one call of the model.

    attention_mask: [B, past + S]; its last S columns are this call's. None means no padding.
    num_images: images handed over in this call, in the order of their marks.
    is_cached: the call goes on after cached positions, whose modality was fixed at prefill; its tokens are language,
        whatever token was generated.
    instruction_mask: [B, S of the prompt], 1 at the user's words; tokens after the prompt are none of them.
    cluster_ids, dataset_ids: [B], the cluster of each row's instruction, and the index of its dataset. prompt: what was decided for whole samples at the prompt.

    Raises:
        ValueError: a mask or an instruction mask of another shape, image tokens without an image, or that do not divide among the images.
    """
    batch, sequence = input_ids_BS.shape
    device = input_ids_BS.device
    if attention_mask is not None and (
        attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < sequence
    ):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; allowed: [{batch}, at least {sequence}], "
            "or pass the routing context explicitly"
        )
    if not num_images and not is_cached and bool((input_ids_BS == image_token_id).any()):
        raise ValueError("input_ids hold image tokens, but no pixel_values came with them")
    is_token_BS = torch.ones_like(input_ids_BS, dtype=torch.bool)
    if attention_mask is not None:
        is_token_BS = attention_mask[:, -sequence:].bool()

    is_vision_BS = (input_ids_BS == image_token_id) & is_token_BS if num_images else torch.zeros_like(is_token_BS)
    image_BS = torch.full((batch, sequence), -1, dtype=torch.int32, device=device)
    if num_images:
        image_BS = _image_of_token(is_vision_BS, num_images)
    modality_BS = torch.where(is_vision_BS, int(Modality.VISION), int(Modality.LANGUAGE))
    modality_BS = torch.where(is_token_BS, modality_BS, int(Modality.PADDING)).to(torch.int8)
    sample_B1 = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    return RoutingContext(
        modality_BS=modality_BS,
        image_BS=image_BS,
        sample_BS=torch.where(is_token_BS, sample_B1, -1),
        num_samples=batch,
        instruction_BS=_instruction(instruction_mask, is_token_BS, is_cached=is_cached),
        cluster_N=cluster_ids,
        dataset_N=dataset_ids,
        is_packed=False,
        prompt=prompt,
    )


def _instruction(mask: Tensor | None, is_token_BS: Tensor, *, is_cached: bool) -> Tensor | None:
    """Bool [B, S]: the user's words in this call. What comes after the prompt is an answer."""
    if mask is None:
        return None
    if is_cached:
        return torch.zeros_like(is_token_BS)
    batch, sequence = is_token_BS.shape
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] > sequence:
        raise ValueError(
            f"instruction_mask has shape {tuple(mask.shape)}; allowed: [{batch}, at most {sequence}], one number a "
            "position of the prompt"
        )
    padded_BS = torch.nn.functional.pad(mask.bool(), (0, sequence - mask.shape[1]))
    return padded_BS & is_token_BS


def _image_of_token(is_vision_BS: Tensor, num_images: int) -> Tensor:
    """Int32 [B, S]: which image an image token shows. Images of one batch have the same number of tokens."""
    num_tokens = int(is_vision_BS.sum())
    if num_tokens % num_images:
        raise ValueError(f"{num_tokens} image tokens in input_ids do not divide among {num_images} images")
    per_image = max(num_tokens // num_images, 1)
    ordinal_BS = (is_vision_BS.flatten().cumsum(0) - 1).view_as(is_vision_BS)
    return torch.where(is_vision_BS, ordinal_BS // per_image, -1).to(torch.int32)
