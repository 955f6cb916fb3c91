from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_lvlm.data.collator import Collator
from moe_lvlm.data.errors import ImageSizeError
from moe_lvlm.data.sample import Sample

PAD, IMAGE = 0, 9


def sample(ids: list[int], key: str = "a/0", image_tokens: tuple[int, ...] = (), size: int = 4) -> Sample:
    ids_S = torch.tensor(ids)
    return Sample(
        key=key,
        dataset="a",
        task=None,
        input_ids=ids_S,
        labels=torch.where(ids_S >= 20, ids_S, -100),
        instruction=(ids_S >= 10) & (ids_S < 20),
        pixel_values=torch.rand(len(image_tokens), 3, size, size) if image_tokens else None,
        image_tokens=image_tokens,
    )


@pytest.fixture
def collator() -> Collator:
    return Collator(pad_token_id=PAD, image_token_id=IMAGE)


def test_a_batch_by_hand(collator: Collator) -> None:
    # two images of different length side by side, a text with the padding token inside it, one image at the end
    first = sample([1, IMAGE, IMAGE, IMAGE, 10, 20, 21], image_tokens=(2, 1))
    text = sample([1, PAD, 11, 20])
    last = sample([12, 20, IMAGE], image_tokens=(1,))
    batch = collator([first, text, last])
    assert batch["input_ids"].tolist() == [[1, 9, 9, 9, 10, 20, 21], [1, 0, 11, 20, 0, 0, 0], [12, 20, 9, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    x = -100
    assert batch["labels"].tolist() == [[x, x, x, x, x, 20, 21], [x, x, x, 20, x, x, x], [x, 20, x, x, x, x, x]]
    routing = batch["routing"]
    assert routing.modality_BS.tolist() == [[1, 2, 2, 2, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 2, 0, 0, 0, 0]]
    assert routing.image_BS.tolist() == [[-1, 0, 0, 1, -1, -1, -1], [-1] * 7, [-1, -1, 2, -1, -1, -1, -1]]
    assert routing.sample_BS.tolist() == [[0] * 7, [1, 1, 1, 1, -1, -1, -1], [2, 2, 2, -1, -1, -1, -1]]
    assert routing.instruction_BS is not None
    assert routing.instruction_BS.nonzero().tolist() == [[0, 4], [1, 2], [2, 0]]
    assert (routing.modality_BS.dtype, routing.image_BS.dtype) == (torch.int8, torch.int32)
    assert (routing.num_samples, routing.task_N, routing.cluster_N) == (3, None, None)
    assert first.pixel_values is not None
    assert last.pixel_values is not None
    assert torch.equal(batch["pixel_values"], torch.cat([first.pixel_values, last.pixel_values]))


def test_padding_with_the_image_tokens_neighbour_is_not_vision() -> None:
    # eos as padding token: only the attention mask tells them apart
    batch = Collator(pad_token_id=20, image_token_id=IMAGE)([sample([1, 20]), sample([1, 10, 11, 20])])
    assert batch["routing"].modality_BS.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 20, -100, -100], [-100, -100, -100, 20]]


def test_text_alone_has_no_pixels(collator: Collator) -> None:
    assert "pixel_values" not in collator([sample([1, 20])])


def test_no_sample_gives_one_row_of_padding(collator: Collator) -> None:
    batch = collator([])
    assert batch["input_ids"].tolist() == [[PAD]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["attention_mask"].tolist() == [[0]]
    routing = batch["routing"]
    assert (routing.modality_BS.tolist(), routing.image_BS.tolist(), routing.sample_BS.tolist()) == (
        [[0]],
        [[-1]],
        [[-1]],
    )
    assert (routing.num_samples, routing.task_N, routing.cluster_N) == (0, None, None)
    assert "pixel_values" not in batch
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "labels", "attention_mask"))


def test_task_labels_and_clusters_by_sample() -> None:
    collator = Collator(pad_token_id=PAD, image_token_id=IMAGE, has_task_labels=True)
    samples = [sample([1, 20]), sample([1, 10, 20]), sample([20])]
    known = zip(samples, (2, None, 0), (7, 0, 7), strict=True)
    routing = collator([replace(one, task_label=task, cluster=cluster) for one, task, cluster in known])["routing"]
    assert routing.task_N is not None
    assert routing.cluster_N is not None
    assert (routing.task_N.tolist(), routing.cluster_N.tolist()) == ([2, -1, 0], [7, 0, 7])
    assert (routing.task_N.dtype, routing.cluster_N.dtype) == (torch.int64, torch.int64)
    # rules that fit none of a batch's samples, and no sample at all
    assert [one["routing"].task_N.tolist() for one in (collator(samples), collator([]))] == [[-1, -1, -1], []]  # type: ignore[union-attr]


def test_images_of_two_sizes_are_refused_by_name(collator: Collator) -> None:
    samples = [sample([IMAGE], "a/3", (1,)), sample([IMAGE], "b/7", (1,), size=8)]
    with pytest.raises(ImageSizeError, match=r"a/3: \(4, 4\), b/7: \(8, 8\)"):
        collator(samples)


def test_a_packed_batch_by_hand() -> None:
    collator = Collator(pad_token_id=PAD, image_token_id=IMAGE, has_task_labels=True, is_packed=True)
    first = sample([1, IMAGE, IMAGE, IMAGE, 10, 20, 21], image_tokens=(2, 1))
    text = sample([20, PAD, 11, 20])  # its first token has a label, which the sample before must not predict
    last = sample([12, 20, IMAGE], image_tokens=(1,))
    batch = collator([first, text, last])
    assert "attention_mask" not in batch
    assert batch["input_ids"].tolist() == [[1, 9, 9, 9, 10, 20, 21, 20, 0, 11, 20, 12, 20, 9]]
    x = -100
    assert batch["labels"].tolist() == [[x, x, x, x, x, 20, 21, x, x, x, 20, x, 20, x]]
    assert text.labels[0] == 20
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 0, 1, 2]]
    assert batch["sample_lengths"] == (7, 4, 3)
    routing = batch["routing"]
    assert routing.modality_BS.tolist() == [[1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]]
    assert routing.image_BS.tolist() == [[-1, 0, 0, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 2]]
    assert routing.sample_BS.tolist() == [[0] * 7 + [1] * 4 + [2] * 3]
    assert routing.instruction_BS is not None
    assert routing.instruction_BS.nonzero().tolist() == [[0, 4], [0, 9], [0, 11]]
    assert (routing.modality_BS.dtype, routing.sample_BS.dtype) == (torch.int8, torch.int32)
    assert (routing.num_samples, routing.is_packed) == (3, True)
    assert batch["pixel_values"].shape[0] == 3
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "labels", "position_ids"))


def test_a_packed_batch_without_a_sample() -> None:
    batch = Collator(pad_token_id=PAD, image_token_id=IMAGE, is_packed=True)([])
    found = {key: batch[key].tolist() for key in ("input_ids", "labels", "position_ids")}  # type: ignore[literal-required]
    assert found == {"input_ids": [[PAD]], "labels": [[-100]], "position_ids": [[0]]}
    assert batch["sample_lengths"] == (1,)
    routing = batch["routing"]
    assert (routing.modality_BS.tolist(), routing.sample_BS.tolist(), routing.num_samples) == ([[0]], [[-1]], 0)
