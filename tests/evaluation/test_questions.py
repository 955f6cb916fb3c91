"""Evaluation sets of every source: what is asked, what the connector reads, what metrics compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moe_lvlm.config.recipe import DataSettings, TaskSettings
from moe_lvlm.data.errors import BadRecordError
from moe_lvlm.evaluation.metrics import Truth
from moe_lvlm.evaluation.questions import Question, read_questions

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
VQA: dict[str, Any] = {
    "path": "vqa/v2_OpenEnded_mscoco_train2014_questions.json",
    "annotations": "vqa/v2_mscoco_train2014_annotations.json",
}


def questions(root: Path = FIXTURES, *, limit: int | None = None, **task: Any) -> list[Question]:
    settings = TaskSettings.model_validate({"name": "set", **task})
    return read_questions(settings, DataSettings(image_root=str(root)), limit=limit)


def test_questions_with_ten_answers() -> None:
    # the third question of the file has no answer, which is an error of its own
    one, two = questions(source="vqa", metric="vqa", limit=2, instructions="vqa", **VQA)
    assert (one.task, one.key, one.text) == ("set", "set/0", "What is this photo taken looking through?")
    assert one.answer == "net"
    assert one.truth == Truth(
        answer="net",
        answers=("net",) * 7 + ("netting",) + ("mesh",) * 2,
        image="COCO_train2014_000000458752.jpg",
    )
    assert two.connector_words == "What position is this man playing?"
    with pytest.raises(BadRecordError, match=r"record 2 \(id '262146000'\): the question has no `answers`"):
        questions(source="vqa", metric="vqa", **VQA)


def test_the_connector_reads_the_bare_question() -> None:
    (first, *_) = questions(
        source="aokvqa", path="aokvqa/aokvqa_v1p0_train.json", instructions="choice", metric="choice"
    )
    bare = "What is the man by the bags awaiting?"
    assert first.text == f"{bare} Choose from skateboarder, train, delivery, cab."
    assert first.connector_words == bare
    assert (first.truth.answer, first.truth.options) == ("cab", ("skateboarder", "train", "delivery", "cab"))


def test_one_answer() -> None:
    yes, no = questions(source="vsr", path="vsr/test.jsonl", metric="yes_no")
    assert (yes.answer, no.answer) == ("yes", "no")
    sky, wall = questions(source="gqa", path="gqa/train_balanced_questions.json")
    assert (sky.answer, wall.answer) == ("yes", "pipe")
    with pytest.raises(BadRecordError, match=r"train_balanced_questions.json: record 1 .*'pipe'; allowed: yes and no"):
        questions(source="gqa", path="gqa/train_balanced_questions.json", metric="yes_no")


def test_captions_are_a_question_an_image() -> None:
    captions = questions(
        source="coco_captions", path="coco_captions/captions_val2014.json", instructions="caption", metric="cider"
    )
    assert [(one.text, one.connector_words, len(one.truth.references)) for one in captions] == [
        ("A photo of", None, 2),
        ("A photo of", None, 1),
    ]
    assert captions[1].truth.references == ("A woman cutting a large white sheet cake.",)


def test_llava_records_say_the_same_by_their_keys(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "a cat"}]
    record = {"image": "a.png", "conversations": turns, "references": ["a cat", "the cat"], "answers": ["no list"]}
    other = {**record, "references": ["a dog"]}
    (tmp_path / "r.json").write_text(json.dumps([record, other]))
    one, two = questions(tmp_path, path="r.json", metric="cider")
    assert two.truth.references == ("a dog",)
    assert (one.truth.references, one.truth.answers) == (("a cat", "the cat"), ())
    assert (one.text, one.connector_words) == ("Describe it.", None)
    assert one.image_path() == tmp_path / "a.png"
    record["references"] = "a cat"
    (tmp_path / "r.json").write_text(json.dumps([other, record]))
    with pytest.raises(BadRecordError, match="record 1: references is 'a cat'; allowed: a list of strings"):
        questions(tmp_path, path="r.json", metric="cider")


def test_images_are_found_by_the_pattern(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "2354786.png")
    path = str(FIXTURES / "gqa/train_balanced_questions.json")
    sky, wall = questions(tmp_path, source="gqa", path=path, image_pattern="{imageId}.png")
    assert sky.image_path() == tmp_path / "2354786.png"
    assert sky.load_images()[0].size == (8, 8)
    with pytest.raises(BadRecordError, match=r"record 1 \(id '07333408'\): image '2375429.png' is not a file"):
        wall.image_path()
