"""Samples to a batch.

B rows   S sequence   A answer   L words of the connector   N samples   n images   C, H, W channels, height, width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import ProcessorMixin

from moe_lvlm.data.errors import ImageSizeError
from moe_lvlm.data.sample import IGNORED_LABEL, Sample
from moe_lvlm.routing.types import Modality, RoutingContext


class Batch(TypedDict):
    """Arguments of the model's forward.

    input_ids, attention_mask (int64), labels (not shifted): [B, S], padded on the right; labels are [B, 1 + A] where
    answers stand apart. pixel_values: [n, C, H, W], images in row-major order of their placeholders; absent if there is
    none. qformer_input_ids, qformer_attention_mask (int64): [n, L], padded on the right, a row an image; absent without
    images, or where the connector reads no words.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    routing: RoutingContext
    pixel_values: NotRequired[Tensor]
    qformer_input_ids: NotRequired[Tensor]
    qformer_attention_mask: NotRequired[Tensor]


class Collator:
    """Pads samples to one length and writes down which token is what, and what is known of each sample.

    No sample at all (every record of a micro-batch was bad) gives an empty batch: one row of one padding token with
    label -100, attention mask 0 and modality padding, so that this rank runs forward and backward with the others.

    has_task_labels: whether there are rules that label samples; without them `task_N` is None. connector_pad_id: of the
    tokenizer of the connector's words; None where it reads none.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        image_token_id: int,
        has_task_labels: bool = False,
        connector_pad_id: int | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.image_token_id = image_token_id
        self.has_task_labels = has_task_labels
        self.connector_pad_id = connector_pad_id

    @classmethod
    def for_processor(cls, processor: ProcessorMixin, *, has_task_labels: bool = False) -> Collator:
        """The collator for a processor whose tokenizers have pad tokens."""
        connector_tokenizer = getattr(processor, "qformer_tokenizer", None)
        return cls(
            pad_token_id=processor.tokenizer.pad_token_id,
            image_token_id=processor.image_token_id,
            has_task_labels=has_task_labels,
            connector_pad_id=None if connector_tokenizer is None else connector_tokenizer.pad_token_id,
        )

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Raises ImageSizeError if images of different processed sizes come together."""
        none = torch.empty(0, dtype=torch.int64)
        input_ids_BS, attention_BS = pad_rows([one.input_ids for one in samples] or [none], self.pad_token_id)
        # on a length of their own, since they may stand apart
        labels_BA, _ = pad_rows([one.labels for one in samples] or [none], IGNORED_LABEL)
        instruction_BS = torch.zeros(input_ids_BS.shape, dtype=torch.bool)
        sample_BS = torch.full(input_ids_BS.shape, -1, dtype=torch.int32)
        for row, sample in enumerate(samples):
            end = len(sample.input_ids)
            instruction_BS[row, :end] = sample.instruction
            sample_BS[row, :end] = row

        is_vision_BS = (input_ids_BS == self.image_token_id) & (attention_BS == 1)
        modality_BS = torch.where(is_vision_BS, int(Modality.VISION), int(Modality.LANGUAGE)) * attention_BS
        batch = Batch(
            input_ids=input_ids_BS,
            attention_mask=attention_BS,
            labels=labels_BA,
            routing=RoutingContext(
                modality_BS=modality_BS.to(torch.int8),
                image_BS=_image_index(is_vision_BS, samples),
                sample_BS=sample_BS,
                num_samples=len(samples),
                instruction_BS=instruction_BS,
                task_N=_task_labels(samples) if self.has_task_labels else None,
                cluster_N=_clusters(samples),
                dataset_N=_known(samples, "dataset_index"),
                draw_N=_known(samples, "draw"),
                is_packed=False,
            ),
        )
        pixel_values = _pixel_values(samples)
        if pixel_values is None:
            return batch
        batch["pixel_values"] = pixel_values
        if self.connector_pad_id is not None:
            words = pad_rows(_connector_rows(samples), self.connector_pad_id)
            batch["qformer_input_ids"], batch["qformer_attention_mask"] = words
        return batch


def pad_rows(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids on one length of at least 1, padded on the right, and where they stand: two int64 [rows, length]."""
    length = max(max(len(row) for row in rows), 1)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return ids, mask


def _connector_rows(samples: Sequence[Sample]) -> list[Tensor]:
    """The words of each image, which are those of its sample."""
    rows = []
    for sample in samples:
        if sample.image_tokens:
            assert sample.connector_ids is not None, f"{sample.key}: made without the words that the connector reads"
            rows += [sample.connector_ids] * len(sample.image_tokens)
    return rows


def _task_labels(samples: Sequence[Sample]) -> Tensor:
    """Int64 [N], -1 for a sample that no rule fits."""
    labels = [-1 if sample.task_label is None else sample.task_label for sample in samples]
    return torch.tensor(labels, dtype=torch.int64)


def _clusters(samples: Sequence[Sample]) -> Tensor | None:
    """Int64 [N]; None where clusters are not known, which holds for all samples or none."""
    clusters = [sample.cluster for sample in samples if sample.cluster is not None]
    assert len(clusters) in (0, len(samples)), "samples with and without a cluster in one batch"
    return torch.tensor(clusters, dtype=torch.int64) if clusters else None


def _known(samples: Sequence[Sample], field: Literal["draw", "dataset_index"]) -> Tensor | None:
    """A number of each sample, int64 [N]; None where those of some are not known."""
    numbers = [getattr(sample, field) for sample in samples]
    return None if None in numbers else torch.tensor(numbers, dtype=torch.int64)


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
