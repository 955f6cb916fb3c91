"""Rules that label records, on LLaVA-mix-665k's kinds of record; labels by hand, as in LTDR's appendix A.3."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from moe_lvlm.config.recipe import TaskTypeSettings
from moe_lvlm.data.records import Record, Turn
from moe_lvlm.data.tasks import TaskRules

CAPTION, VQA, OCR, REGION = range(4)
RULES = TaskRules(
    [
        TaskTypeSettings(label=OCR, image=r"^ocr_vqa/"),
        TaskTypeSettings(label=REGION, instruction=r"(?i)for this region|bounding box coordinate"),
        TaskTypeSettings(label=CAPTION, instruction=r"^Provide a one-sentence caption", image=r"."),
        TaskTypeSettings(label=VQA, dataset="llava", instruction=r"single word or phrase\.$"),
        TaskTypeSettings(label=VQA, task="choice"),
    ]
)


def record(*human: str, image: str | None = "coco/1.jpg", task: str | None = None) -> Record:
    turns = tuple(turn for text in human for turn in (Turn("human", text), Turn("gpt", "Provide. for this region")))
    return Record(id=None, images=() if image is None else (image,), turns=turns, task=task)


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        (record("<image>\nWho wrote this book?", image="ocr_vqa/images/1.jpg"), OCR),
        (record("<image>\nPlease provide a short description for this region: [0, 0, 1, 1]."), REGION),
        (record("<image>\nHello", "Please provide the Bounding Box coordinates of the region"), REGION),
        (record("<image>\nProvide a one-sentence caption for the provided image."), CAPTION),
        (record("What is it?\nAnswer the question using a single word or phrase.\n<image>"), VQA),
        (record("<image>\nWhich one?", task="choice"), VQA),
        # a caption rule that asks for an image, and an answer that reads like a question on a region
        (record("Provide a one-sentence caption for the text.", image=None), None),
        (record("<image>\nWhat do you see?"), None),
        # the first rule that fits: OCR before VQA
        (record("<image>\nAnswer with a single word or phrase.", image="ocr_vqa/2.jpg"), OCR),
    ],
)
def test_labels_by_hand(asked: Record, label: int | None) -> None:
    assert RULES.label(asked, "llava") == label


def test_a_dataset_is_compared_whole() -> None:
    asked = record("<image>\nWhat?\nAnswer with a single word or phrase.")
    assert RULES.label(asked, "llava") == VQA
    assert RULES.label(asked, "llava2") is None


def test_a_rule_that_gives_nothing_fits_all() -> None:
    rules = TaskRules([TaskTypeSettings(label=3, task="choice"), TaskTypeSettings(label=1)])
    assert [rules.label(record("a", task=task), "x") for task in ("choice", None)] == [3, 1]
    assert len(rules) == 2


@pytest.mark.parametrize("key", ["instruction", "image"])
def test_what_is_no_regular_expression_is_refused_when_the_rule_is_made(key: str) -> None:
    with pytest.raises(ValidationError, match=rf"{key}\n.*no regular expression: .*unterminated subpattern"):
        TaskTypeSettings.model_validate({"label": 0, key: "(a"})
