"""Readers of published layouts, on a few records of each (fixtures/): what is asked, answered, shown, and refused."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data.errors import BadRecordError, DataFileError
from moe_lvlm.data.mixture import Source, open_records
from moe_lvlm.data.published import DATASETS

from .conftest import MakeBuilder

FIXTURES = Path(__file__).parent / "fixtures"
CAPTION_SOURCES = ("coco_captions", "textcaps", "nocaps")


def opened(source: str, path: str, *, for_evaluation: bool = False, **more: Any) -> Source:
    if source in CAPTION_SOURCES:
        more = {"instructions": ["A photo of"], **more}
    settings = RecordsSettings.model_validate({"source": source, "path": path, **more})
    return open_records(settings, str(FIXTURES), for_evaluation=for_evaluation)


def vqa(folder: str = "vqa", split: str = "train", version: str = "v2_", **more: Any) -> Source:
    return opened(
        "vqa",
        f"{folder}/{version}OpenEnded_mscoco_{split}2014_questions.json",
        annotations=f"{folder}/{version}mscoco_{split}2014_annotations.json",
        **more,
    )


def shown(source: Source, index: int) -> tuple[str | None, tuple[str, ...], str | None, str, str]:
    """id, images, question, human words, answer."""
    record = source.record(index)
    human, answer = record.turns
    assert human.text.startswith("<image>\n")
    return record.id, record.images, record.question, human.text.removeprefix("<image>\n"), answer.text


def test_gqa() -> None:
    source = opened("gqa", "gqa/train_balanced_questions.json")
    assert len(source) == 2
    sky = "Is the sky dark?"
    assert shown(source, 0) == ("02930152", ("2354786.jpg",), sky, sky, "yes")
    wall = "What is on the white wall?"
    assert shown(source, 1) == ("07333408", ("2375429.jpg",), wall, wall, "pipe")
    # programs and references are most of the file, and not kept
    assert source.records[0] == {"question_id": "02930152", "question": sky, "imageId": "2354786", "answer": "yes"}


def test_vqa_v2() -> None:
    source = vqa()
    assert len(source) == 3
    asked = "What is this photo taken looking through?"
    assert shown(source, 0) == ("458752000", ("COCO_train2014_000000458752.jpg",), asked, asked, "net")
    # the annotators' own choice, though as many say catcher
    assert shown(source, 1)[4] == "pitcher"
    assert source.facts(0) == {"answers": ["net"] * 7 + ["netting"] + ["mesh"] * 2}
    with pytest.raises(BadRecordError, match=r"record 2 \(id '262146000'\): the question has no `answers`"):
        source.record(2)


def test_ok_vqa() -> None:
    source = vqa("okvqa", "val", "")
    asked = "What sport can you use this for?"
    assert shown(source, 0) == ("2971475", ("COCO_val2014_000000297147.jpg",), asked, asked, "race")
    assert source.facts(0) == {"answers": ["race"] * 6 + ["motocross"] * 2 + ["ride"] * 2}


def test_vizwiz() -> None:
    source = opened("vizwiz", "vizwiz/val.json")
    asked = "Can you tell me what this medicine is please?"
    # "unanswerable" and "night time" are three each: the first that was given
    image = "VizWiz_val_00000001.jpg"
    assert shown(source, 0) == (image, (image,), asked, asked, "unanswerable")
    assert len(source.facts(0)["answers"]) == 10
    assert "" in source.facts(0)["answers"]
    assert all(source.record(0, draw).turns[1].text for draw in range(200))


def test_a_okvqa() -> None:
    source = opened("aokvqa", "aokvqa/aokvqa_v1p0_train.json", instructions="choice")
    asked = "What is the man by the bags awaiting?"
    words = f"{asked} Choose from skateboarder, train, delivery, cab."
    assert shown(source, 0) == ("22MexNkBPpdZGX6sxbxVBH", ("train2017/000000299207.jpg",), asked, words, "cab")
    assert shown(source, 1)[1:] == (
        ("train2017/000000000096.jpg",),
        "Where does this man eat pizza?",
        "Where does this man eat pizza? Choose from office, cafe, mother's house, outside deck.",
        "office",
    )
    facts = source.facts(0)
    assert facts["options"] == ["skateboarder", "train", "delivery", "cab"]
    assert Counter(facts["answers"])["taxi"] == 2
    with pytest.raises(BadRecordError, match="`correct_choice_idx` is missing"):
        opened("aokvqa", "aokvqa/aokvqa_v1p0_test.json").record(0)


def test_coco_captions_a_record_a_caption() -> None:
    source = opened("coco_captions", "coco_captions/captions_val2014.json")
    assert [shown(source, index)[1:] for index in range(len(source))] == [
        (("COCO_val2014_000000522418.jpg",), None, "A photo of", "A woman cutting a large white sheet cake."),
        (
            ("COCO_val2014_000000391895.jpg",),
            None,
            "A photo of",
            "A man with a red helmet on a small moped on a dirt road.",
        ),
        (
            ("COCO_val2014_000000391895.jpg",),
            None,
            "A photo of",
            "Man riding a motor bike on a dirt road on the countryside.",
        ),
    ]


REFERENCES = [
    "A man with a red helmet on a small moped on a dirt road.",
    "Man riding a motor bike on a dirt road on the countryside.",
]


def test_coco_captions_a_record_an_image() -> None:
    source = opened("coco_captions", "coco_captions/captions_val2014.json", for_evaluation=True)
    assert [source.record(index).images[0][-10:] for index in range(len(source))] == ["391895.jpg", "522418.jpg"]
    assert source.facts(0) == {"references": REFERENCES}
    assert source.record(0).turns[1].text == REFERENCES[0]
    assert source.facts(1) == {"references": ["A woman cutting a large white sheet cake."]}


def test_karpathys_split_as_blip_has_it() -> None:
    train = opened("coco_captions", "coco_captions/coco_karpathy_train.json")
    last_words = [train.record(index).turns[1].text.split()[-1] for index in range(len(train))]
    assert last_words == ["cake.", "cake.", "yak."]
    assert train.record(0).images == ("val2014/COCO_val2014_000000522418.jpg",)
    test = opened("coco_captions", "coco_captions/coco_karpathy_test.json", for_evaluation=True)
    assert (len(test), test.facts(0)) == (1, {"references": REFERENCES})
    # training's file, should one evaluate on it: three captions of two images
    grouped = opened("coco_captions", "coco_captions/coco_karpathy_train.json", for_evaluation=True)
    assert [len(grouped.facts(index)["references"]) for index in range(len(grouped))] == [2, 1]
    # its ground truth in COCO's layout names no files
    ground_truth = "coco_captions/coco_karpathy_test_gt.json"
    pattern = "val2014/COCO_val2014_{image_id:012d}.jpg"
    truth = opened("coco_captions", ground_truth, for_evaluation=True, image_pattern=pattern)
    assert truth.record(0).images == test.record(0).images
    with pytest.raises(BadRecordError, match=r"'{file_name}' asks for file_name; the record has captions, image_id"):
        opened("coco_captions", ground_truth, for_evaluation=True).record(0)


def test_textcaps() -> None:
    source = opened("textcaps", "textcaps/TextCaps_0.1_train.json")
    assert [shown(source, index)[0] for index in range(len(source))] == [
        *("f47b7c4d4f9b7b1d", "0054c91397f2fe05", "f47b7c4d4f9b7b1d"),
    ]
    assert shown(source, 1)[1:] == (("0054c91397f2fe05.jpg",), None, "A photo of", "A sign that says STOP")
    grouped = opened("textcaps", "textcaps/TextCaps_0.1_train.json", for_evaluation=True)
    assert [grouped.facts(index)["references"] for index in range(len(grouped))] == [
        ["Five Listerine Zero mouthwash bottles on a store shelf", "A row of mouthwash says 50% more"],
        ["A sign that says STOP"],
    ]


def test_nocaps() -> None:
    source = opened("nocaps", "nocaps/nocaps_val_4500_captions.json", for_evaluation=True)
    assert len(source) == 1
    assert source.record(0).images == ("0013ea2087020901.jpg",)
    assert source.facts(0) == {
        "references": ["A baby is standing in front of a house.", "A little girl in a white jacket and sandals."]
    }


def test_statements_are_asked_as_questions() -> None:
    vsr = opened("vsr", "vsr/test.jsonl")
    asked = 'Based on the image, is this statement true? "The teddy bear is in front of the person."'
    assert shown(vsr, 0) == ("000000050403.jpg", ("000000050403.jpg",), asked, asked, "yes")
    assert shown(vsr, 1)[4] == "no"
    memes = opened("hateful_memes", "hateful_memes/dev_seen.jsonl")
    asked = 'This is an image with: "when the cat is hungry" written on it. Is it hateful?'
    assert shown(memes, 0) == ("8291", ("img/08291.png",), asked, asked, "yes")
    assert shown(memes, 1)[4] == "no"
    with pytest.raises(BadRecordError, match=r"test_seen\.jsonl: record 0 \(id '16395'\): `label` is missing"):
        opened("hateful_memes", "hateful_memes/test_seen.jsonl").record(0)


def test_a_draw_chooses_among_the_answers_and_the_instructions() -> None:
    source = vqa(instructions=["{QUESTION}", "Q: {QUESTION} A:"])
    drawn = [source.record(0, draw) for draw in range(4000)]
    asked = "What is this photo taken looking through?"
    assert {one.question for one in drawn} == {asked}
    count = Counter((one.turns[0].text.removeprefix("<image>\n"), one.turns[1].text) for one in drawn)
    assert set(count) == {(w, a) for w in (asked, f"Q: {asked} A:") for a in ("net", "netting", "mesh")}
    # ten people, each as likely; the instruction has nothing to do with it. 4 standard deviations are 4 x 30
    for words in (asked, f"Q: {asked} A:"):
        assert all(abs(count[words, answer] - 4000 * share / 2) < 120 for answer, share in _SHARES.items())
    assert drawn[17] == source.record(0, 17)
    captions = opened("nocaps", "nocaps/nocaps_val_4500_captions.json", for_evaluation=True)
    assert len({captions.record(0, draw).turns[1].text for draw in range(50)}) == 2


_SHARES = {"net": 0.7, "netting": 0.1, "mesh": 0.2}


def test_evaluation_takes_the_first_instruction() -> None:
    source = vqa(instructions="vqa")
    assert shown(source, 0)[3] == "What is this photo taken looking through?"
    assert shown(vqa(instructions=["Question: {QUESTION} Short answer:", "{QUESTION}"]), 0)[3] == (
        "Question: What is this photo taken looking through? Short answer:"
    )


def test_braces_in_a_question_are_words(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"1": {"imageId": "a", "question": "{QUESTION} {x}?", "answer": "{}"}}))
    source = open_records(RecordsSettings(source="gqa", path="q.json"), str(tmp_path))
    assert shown(source, 0)[3:] == ("{QUESTION} {x}?", "{}")


def test_images_are_found_by_the_pattern(make_builder: MakeBuilder, tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "train2017" / "000000299207.jpg")
    Image.new("RGB", (20, 20)).save(tmp_path / "96_train.png")
    path = str(FIXTURES / "aokvqa/aokvqa_v1p0_train.json")
    for pattern, index in ((None, 0), ("{image_id}_{split}.png", 1)):
        settings = RecordsSettings(source="aokvqa", path=path, image_pattern=pattern, image_root=str(tmp_path))
        source = open_records(settings, ".")
        assert source.sample(index, make_builder()).image_tokens == (4,)
        with pytest.raises(BadRecordError, match=r"is not a file below the image root"):
            source.sample(1 - index, make_builder())


@pytest.mark.parametrize("source", list(DATASETS))
def test_sources_travel_to_worker_processes(source: str) -> None:
    made = {
        "vqa": vqa,
        "gqa": lambda: opened("gqa", "gqa/train_balanced_questions.json"),
        "aokvqa": lambda: opened("aokvqa", "aokvqa/aokvqa_v1p0_train.json"),
        "coco_captions": lambda: opened("coco_captions", "coco_captions/captions_val2014.json"),
        "textcaps": lambda: opened("textcaps", "textcaps/TextCaps_0.1_train.json"),
        "vizwiz": lambda: opened("vizwiz", "vizwiz/val.json"),
        "vsr": lambda: opened("vsr", "vsr/test.jsonl"),
        "hateful_memes": lambda: opened("hateful_memes", "hateful_memes/dev_seen.jsonl"),
        "nocaps": lambda: opened("nocaps", "nocaps/nocaps_val_4500_captions.json"),
        "ocrvqa": lambda: opened("ocrvqa", "ocrvqa/dataset.json"),
        "textvqa": lambda: opened("textvqa", "textvqa/TextVQA_0.5.1_val.json"),
        "iconqa": lambda: opened("iconqa", "iconqa/problems.json"),
        "scienceqa": lambda: opened("scienceqa", "scienceqa/problems.json"),
        "vqa_rad": lambda: opened("vqa_rad", "vqa_rad/VQA_RAD Dataset Public.json"),
        "slake": lambda: opened("slake", "slake/test.json"),
        "pathvqa": lambda: opened("pathvqa", "slake/test.json", image_pattern="{img_name}"),  # as JSON, the same keys
    }[source]()
    copy = pickle.loads(pickle.dumps(made))
    assert copy.record(0, 3) == made.record(0, 3)


BAD_FILES: list[tuple[str, str, Any, str]] = [
    ("gqa", "q.json", [1], "holds a list: .*; allowed is an object of questions by id"),
    ("gqa", "q.json", {}, "holds no record"),
    ("gqa", "q.jsonl", {}, r"unknown file format '.jsonl'; allowed are .json"),
    ("aokvqa", "q.json", {"data": []}, "holds an object with data; allowed is a list"),
    ("aokvqa", "q.json", [], "holds no record"),
    ("textcaps", "q.json", {"dataset_name": "textcaps"}, "an object with dataset_name; .* the list data"),
    ("textcaps", "q.json", {"data": 7}, "allowed is an object with the list data"),
    ("vizwiz", "q.json", "text", "holds a string"),
    ("coco_captions", "q.json", {"images": [], "dataset": "coco"}, "an object with dataset, images; allowed is .*BLIP"),
    ("coco_captions", "q.json", {"images": [{"id": 1}, {"id": 1}], "annotations": []}, r"images\[1\] .* id of its own"),
    ("coco_captions", "q.json", {"images": [3], "annotations": []}, r"images\[0\] is a number: 3"),
    ("nocaps", "q.json", {"images": [{"id": 1}]}, "an object with images; allowed"),
    ("vsr", "q.json", [], r"unknown file format '.json'; allowed are .jsonl"),
    ("vsr", "q.jsonl", None, "does not exist"),
    ("gqa", "q.json", None, "does not exist"),
]


@pytest.mark.parametrize(("source", "name", "content", "message"), BAD_FILES)
def test_a_file_of_another_layout_is_refused_at_once(
    tmp_path: Path, source: str, name: str, content: Any, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataFileError, match=message) as caught:
        opened(source, str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"annotations": [{"question_id": 9}]}, "has no answer to any question of .*; are they one split's"),
        ({"annotations": [{"question_id": 1}, {"question_id": 1}]}, r"annotations\[1\]: a second one for .* 1"),
        ({"annotations": [{}]}, r"annotations\[0\] is an object: {}; it must be an object with a question_id"),
        ({"questions": []}, "holds an object with questions; allowed is an object with the list annotations"),
    ],
)
def test_annotations_that_do_not_fit_are_refused_at_once(tmp_path: Path, annotations: object, message: str) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"questions": [{"question_id": 1}]}))
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    with pytest.raises(DataFileError, match=message):
        open_records(RecordsSettings(source="vqa", path="q.json", annotations="a.json"), str(tmp_path))


GQA_RECORD = {"imageId": "1", "question": "q?", "answer": "a"}
CHOICE_RECORD = {"split": "val", "image_id": 3, "question": "q?", "choices": ["x", "y"], "correct_choice_idx": 1}
VIZWIZ_RECORD = {"image": "i.jpg", "question": "q?", "answers": [{"answer": "a"}]}


@pytest.mark.parametrize(
    ("source", "record", "message"),
    [
        ("gqa", 7, "the record is a number: 7; it must be an object"),
        ("gqa", GQA_RECORD | {"question": 3}, "question is a number: 3; it must be a string"),
        ("gqa", GQA_RECORD | {"question": " "}, "question is empty"),
        ("gqa", GQA_RECORD | {"answer": "\ud800"}, "answer holds a lone surrogate"),
        ("gqa", GQA_RECORD | {"question": "an <image>?"}, "the question holds <image>"),
        ("gqa", GQA_RECORD | {"answer": "an <image>"}, "<image> stands in an answer"),
        ("gqa", GQA_RECORD | {"imageId": [1]}, r"imageId is a list: \[1\]; .* named by strings and numbers"),
        ("gqa", {"question": "q?", "answer": "a"}, "asks for imageId; the record has answer, question, question_id"),
        ("aokvqa", CHOICE_RECORD | {"image_id": "3"}, "image_id is a string: \"3\", which '012d' cannot write"),
        ("aokvqa", CHOICE_RECORD | {"choices": "x"}, 'choices is a string: "x"; it must be a list'),
        ("aokvqa", CHOICE_RECORD | {"choices": ["x", ""]}, r"choices\[1\] is empty"),
        ("aokvqa", CHOICE_RECORD | {"correct_choice_idx": 2}, "correct_choice_idx is a number: 2; allowed: 0 to 1"),
        ("aokvqa", CHOICE_RECORD | {"correct_choice_idx": True}, "correct_choice_idx is a boolean"),
        ("aokvqa", CHOICE_RECORD | {"direct_answers": [3]}, r"direct_answers\[0\] is a number"),
        ("vizwiz", VIZWIZ_RECORD | {"answers": []}, r"answers is a list: \[\]; .* at least one"),
        ("vizwiz", VIZWIZ_RECORD | {"answers": ["a"]}, r"answers\[0\] is a string: \"a\"; .* object with `answer`"),
        ("vizwiz", VIZWIZ_RECORD | {"answers": [{"answer": " "}]}, "all 1 are empty"),
        ("vizwiz", VIZWIZ_RECORD | {"image": None}, "image is null"),
        ("coco_captions", {"image": "i.jpg", "caption": ""}, r"captions\[0\] is empty"),
        ("coco_captions", {"image": "i.jpg", "caption": []}, "captions is a list"),
        ("coco_captions", {"image": "i.jpg"}, r"captions\[0\] is null"),
        ("coco_captions", 7, "the record is a number: 7"),
    ],
)
def test_a_bad_record_says_what_is_wrong(tmp_path: Path, source: str, record: object, message: str) -> None:
    content = {"5": record} if source == "gqa" else [record]
    (tmp_path / "q.json").write_text(json.dumps(content))
    found = opened(source, str(tmp_path / "q.json"))
    with pytest.raises(BadRecordError, match=message):
        found.record(0)
    if source == "coco_captions":
        with pytest.raises(BadRecordError, match=message):
            opened(source, str(tmp_path / "q.json"), for_evaluation=True).record(0)


def test_cocos_bad_annotations_are_bad_records(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]
    annotations = [{"image_id": 1, "caption": "a cat"}, {"image_id": 9, "caption": "a dog"}, 7, {"image_id": [1]}]
    (tmp_path / "q.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    one_each = opened("coco_captions", str(tmp_path / "q.json"))
    assert one_each.record(0).images == ("1.jpg",)
    reasons = ("asks for file_name", "is a number: 7", "is null")
    for index, reason in enumerate(reasons, start=1):
        with pytest.raises(BadRecordError, match=reason):
            one_each.record(index)
    by_image = opened("coco_captions", str(tmp_path / "q.json"), for_evaluation=True)
    assert by_image.facts(0) == {"references": ["a cat"]}
    # an image without captions can be no question
    for index, reason in enumerate(("captions is a list", *reasons), start=1):
        with pytest.raises(BadRecordError, match=reason):
            by_image.record(index)
