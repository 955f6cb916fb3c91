"""Samples to a batch.

B rows   S sequence   N samples   n images   C, H, W channels, height, width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import LlavaProcessor

from moe_lvlm.data.errors import ImageSizeError
from moe_lvlm.data.sample import IGNORED_LABEL, Sample
from moe_lvlm.routing.types import Modality, RoutingContext


class Batch(TypedDict):
    """Arguments of the model's forward.

    input_ids, attention_mask (int64), labels (not shifted): [B, S], padded on the right. pixel_values: [n, C, H, W],
    images in row-major order of their placeholders; absent if there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    routing: RoutingContext
    pixel_values: NotRequired[Tensor]


class Collator:
    """Pads samples to one length and writes down which token is what, and what is known of each sample.

    No sample at all (every record of a micro-batch was bad) gives an empty batch: one row of one padding token with
    label -100, attention mask 0 and modality padding, so that this rank runs forward and backward with the others.

    has_task_labels: whether there are rules that label samples; without them `task_N` is None.
    """

    def __init__(self, *, pad_token_id: int, image_token_id: int, has_task_labels: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.image_token_id = image_token_id
        self.has_task_labels = has_task_labels

    @classmethod
    def for_processor(cls, processor: LlavaProcessor, *, has_task_labels: bool = False) -> Collator:
        """The collator for a processor whose tokenizer has a pad token."""
        return cls(
            pad_token_id=processor.tokenizer.pad_token_id,
            image_token_id=processor.image_token_id,
            has_task_labels=has_task_labels,
        )

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Raises ImageSizeError if images of different processed sizes come together."""
        num_rows = max(len(samples), 1)
        length = max((len(sample.input_ids) for sample in samples), default=1)
        input_ids_BS = torch.full((num_rows, length), self.pad_token_id)
        labels_BS = torch.full((num_rows, length), IGNORED_LABEL)
        attention_BS = torch.zeros(num_rows, length, dtype=torch.int64)
        instruction_BS = torch.zeros(num_rows, length, dtype=torch.bool)
        sample_BS = torch.full((num_rows, length), -1, dtype=torch.int32)
        for row, sample in enumerate(samples):
            end = len(sample.input_ids)
            input_ids_BS[row, :end] = sample.input_ids
            labels_BS[row, :end] = sample.labels
            attention_BS[row, :end] = 1
            instruction_BS[row, :end] = sample.instruction
            sample_BS[row, :end] = row

        is_vision_BS = (input_ids_BS == self.image_token_id) & (attention_BS == 1)
        modality_BS = torch.where(is_vision_BS, int(Modality.VISION), int(Modality.LANGUAGE)) * attention_BS
        batch = Batch(
            input_ids=input_ids_BS,
            attention_mask=attention_BS,
            labels=labels_BS,
            routing=RoutingContext(
                modality_BS=modality_BS.to(torch.int8),
                image_BS=_image_index(is_vision_BS, samples),
                sample_BS=sample_BS,
                num_samples=len(samples),
                instruction_BS=instruction_BS,
                task_N=_task_labels(samples) if self.has_task_labels else None,
                cluster_N=_clusters(samples),
            ),
        )
        pixel_values = _pixel_values(samples)
        if pixel_values is not None:
            batch["pixel_values"] = pixel_values
        return batch


def _task_labels(samples: Sequence[Sample]) -> Tensor:
    """Int64 [N], -1 for a sample that no rule fits."""
    labels = [-1 if sample.task_label is None else sample.task_label for sample in samples]
    return torch.tensor(labels, dtype=torch.int64)


def _clusters(samples: Sequence[Sample]) -> Tensor | None:
    """Int64 [N]; None where clusters are not known, which holds for all samples or none."""
    clusters = [sample.cluster for sample in samples if sample.cluster is not None]
    assert len(clusters) in (0, len(samples)), "samples with and without a cluster in one batch"
    return torch.tensor(clusters, dtype=torch.int64) if clusters else None


def _image_index(is_vision_BS: Tensor, samples: Sequence[Sample]) -> Tensor:
    """The image of each vision token, counted over the batch; -1 elsewhere. Int32 [B, S]."""
    counts = torch.tensor([count for sample in samples for count in sample.image_tokens], dtype=torch.int64)
    assert int(counts.sum()) == int(is_vision_BS.sum()), "placeholders and image_tokens disagree"
    image_BS = torch.full(is_vision_BS.shape, -1, dtype=torch.int32)
    # a mask reads row by row, the order in which the images were counted
    image_BS[is_vision_BS] = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
    return image_BS


def _pixel_values(samples: Sequence[Sample]) -> Tensor | None:
    with_images = [(sample.key, sample.pixel_values) for sample in samples if sample.pixel_values is not None]
    if not with_images:
        return None
    sizes = {tuple(pixel_values.shape[1:]) for _, pixel_values in with_images}
    if len(sizes) > 1:
        listed = ", ".join(f"{key}: {tuple(pixel_values.shape[2:])}" for key, pixel_values in with_images)
        raise ImageSizeError(
            f"images of different processed sizes (height, width) in one batch: {listed}; a batch takes one size:"
            " set a fixed size or crop_size in the image processor"
        )
    return torch.cat([pixel_values for _, pixel_values in with_images])
