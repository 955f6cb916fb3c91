"""Samples to a batch.

B rows   S sequence   A answer   L words of the connector   N samples   n images   C, H, W channels, height, width
M features of an image   D their width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import ProcessorMixin

from moe_lvlm.data.errors import ImageSizeError
from moe_lvlm.data.sample import IGNORED_LABEL, Sample
from moe_lvlm.routing.types import Modality, RoutingContext


class Batch(TypedDict):
    """Arguments of the model's forward.

    input_ids, labels (not shifted): [B, S], padded on the right; labels are [B, 1 + A] where answers stand apart.
    attention_mask: int64 [B, S]. Of a packed batch, B = 1 and S the tokens of all samples, one after the other, there is
    none, but position_ids, int64 [1, S], from 0 in each sample, and sample_lengths, the tokens of each, on the host.
    pixel_values: [n, C, H, W], images in row-major order of their placeholders; absent if there is none.
    image_features: [n, M, D] in their place where there is a feature cache; n is 0 without images.
    qformer_input_ids, qformer_attention_mask (int64): [n, L], padded on the right, a row an image; absent without images,
    or where the connector reads no words.
    """

    input_ids: Tensor
    labels: Tensor
    routing: RoutingContext
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    sample_lengths: NotRequired[tuple[int, ...]]
    pixel_values: NotRequired[Tensor]
    image_features: NotRequired[Tensor]
    qformer_input_ids: NotRequired[Tensor]
    qformer_attention_mask: NotRequired[Tensor]


class Collator:
    """Pads samples to one length, or packs them into one row, and writes down which token is what, and what is known of
    each sample.

    No sample at all (every record of a micro-batch was bad) gives an empty batch: one row of one padding token with
    label -100, attention mask 0 and modality padding, so that this rank runs forward and backward with the others.

    has_task_labels: whether there are rules that label samples; without them `task_N` is None. connector_pad_id: of the
    tokenizer of the connector's words; None where it reads none. is_packed: one row without padding; not for samples
    whose answers stand apart. feature_shape: (M, D) of the cache that all images' features come from; None where they come
    as pixels.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        image_token_id: int,
        has_task_labels: bool = False,
        connector_pad_id: int | None = None,
        is_packed: bool = False,
        feature_shape: tuple[int, int] | None = None,
    ) -> None:
        self.pad_token_id = pad_token_id
        self.image_token_id = image_token_id
        self.has_task_labels = has_task_labels
        self.connector_pad_id = connector_pad_id
        self.is_packed = is_packed
        self.feature_shape = feature_shape

    @classmethod
    def for_processor(
        cls,
        processor: ProcessorMixin,
        *,
        has_task_labels: bool = False,
        is_packed: bool = False,
        feature_shape: tuple[int, int] | None = None,
    ) -> Collator:
        """The collator for a processor whose tokenizers have pad tokens."""
        connector_tokenizer = getattr(processor, "qformer_tokenizer", None)
        return cls(
            pad_token_id=processor.tokenizer.pad_token_id,
            image_token_id=processor.image_token_id,
            has_task_labels=has_task_labels,
            connector_pad_id=None if connector_tokenizer is None else connector_tokenizer.pad_token_id,
            is_packed=is_packed,
            feature_shape=feature_shape,
        )

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Raises ImageSizeError if images of different processed sizes come together."""
        rows = _pack(samples, self.pad_token_id) if self.is_packed else _pad(samples, self.pad_token_id)
        is_token_BS = rows.sample_BS >= 0
        is_vision_BS = (rows.input_ids_BS == self.image_token_id) & is_token_BS
        modality_BS = torch.where(is_vision_BS, int(Modality.VISION), int(Modality.LANGUAGE)) * is_token_BS
        batch = Batch(
            input_ids=rows.input_ids_BS,
            labels=rows.labels_BA,
            routing=RoutingContext(
                modality_BS=modality_BS.to(torch.int8),
                image_BS=_image_index(is_vision_BS, samples),
                sample_BS=rows.sample_BS,
                num_samples=len(samples),
                instruction_BS=rows.instruction_BS,
                task_N=_task_labels(samples) if self.has_task_labels else None,
                cluster_N=_clusters(samples),
                dataset_N=_known(samples, "dataset_index"),
                draw_N=_known(samples, "draw"),
                is_packed=self.is_packed,
            ),
        )
        if self.is_packed:
            # an empty batch is a row of one token
            batch["sample_lengths"] = tuple(len(sample.input_ids) for sample in samples) or (1,)
            batch["position_ids"] = torch.cat([torch.arange(length) for length in batch["sample_lengths"]])[None]
        else:
            batch["attention_mask"] = is_token_BS.long()
        if self.feature_shape is not None:
            batch["image_features"] = _image_features(samples, self.feature_shape)
        elif (pixel_values := _pixel_values(samples)) is not None:
            batch["pixel_values"] = pixel_values
        if self.connector_pad_id is not None and any(sample.image_tokens for sample in samples):
            words = pad_rows(_connector_rows(samples), self.connector_pad_id)
            batch["qformer_input_ids"], batch["qformer_attention_mask"] = words
        return batch


def pin_batch(batch: Batch) -> Batch:
    """The same batch in memory that a GPU copies from without waiting for the host."""
    pinned: dict[str, Any] = {name: value.pin_memory() for name, value in batch.items() if isinstance(value, Tensor)}
    facts = {field.name: getattr(batch["routing"], field.name) for field in fields(batch["routing"])}
    tensors = {name: value.pin_memory() for name, value in facts.items() if isinstance(value, Tensor)}
    return Batch(**{**batch, **pinned, "routing": replace(batch["routing"], **tensors)})  # type: ignore[typeddict-item]


@dataclass(frozen=True, slots=True)
class _Rows:
    """instruction_BS bool, sample_BS int32 with -1 at padding."""

    input_ids_BS: Tensor
    labels_BA: Tensor
    instruction_BS: Tensor
    sample_BS: Tensor


def _pad(samples: Sequence[Sample], pad: int) -> _Rows:
    """A row a sample; one row of padding where there is none."""
    none = torch.empty(0, dtype=torch.int64)
    input_ids_BS, _ = pad_rows([one.input_ids for one in samples] or [none], pad)
    # on a length of their own, since they may stand apart
    labels_BA, _ = pad_rows([one.labels for one in samples] or [none], IGNORED_LABEL)
    instruction_BS = torch.zeros(input_ids_BS.shape, dtype=torch.bool)
    sample_BS = torch.full(input_ids_BS.shape, -1, dtype=torch.int32)
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        instruction_BS[row, :end] = sample.instruction
        sample_BS[row, :end] = row
    return _Rows(input_ids_BS, labels_BA, instruction_BS, sample_BS)


def _pack(samples: Sequence[Sample], pad: int) -> _Rows:
    """One row of all samples; one padding token where there is none."""
    if not samples:
        return _pad(samples, pad)
    labels = [sample.labels.clone() for sample in samples]
    for one in labels:
        one[0] = IGNORED_LABEL  # the last token of the sample before does not predict it
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    return _Rows(
        torch.cat([sample.input_ids for sample in samples])[None],
        torch.cat(labels)[None],
        torch.cat([sample.instruction for sample in samples])[None],
        torch.arange(len(samples), dtype=torch.int32).repeat_interleave(lengths)[None],
    )


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


def _image_features(samples: Sequence[Sample], shape: tuple[int, int]) -> Tensor:
    """[n, M, D]; n may be 0, which tells the model that features come from elsewhere than its tower."""
    features = [sample.image_features for sample in samples if sample.image_features is not None]
    return torch.cat(features) if features else torch.empty(0, *shape)


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
