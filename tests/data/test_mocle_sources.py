"""The sets of MoCLE's table 8 in their published layouts (fixtures/), and what its templates make of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_lvlm.config.instructions import INSTRUCTION_SETS
from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data.errors import BadRecordError, DataFileError
from moe_lvlm.data.mixture import Source, open_records
from moe_lvlm.data.published.layout import lettered

FIXTURES = Path(__file__).parent / "fixtures"
OCR_FILE = "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json"


def opened(source: str, path: str, *, for_evaluation: bool = False, **more: Any) -> Source:
    settings = RecordsSettings.model_validate({"source": source, "path": path, **more})
    return open_records(settings, str(FIXTURES), for_evaluation=for_evaluation)


def shown(source: Source, index: int = 0) -> tuple[str | None, tuple[str, ...], str | None, str, str]:
    """id, images, bare question, human words, answer."""
    record = source.record(index)
    human, answer = record.turns
    assert human.text.startswith("<image>\n")
    return record.id, record.images, record.question, human.text.removeprefix("<image>\n"), answer.text


def test_ocr_vqa_has_a_record_a_question() -> None:
    source = opened("ocrvqa", "ocrvqa/dataset.json")
    assert len(source) == 5
    asked = "What is the title of this book?"
    assert shown(source, 1) == ("1435206010/1", ("1435206010.jpg",), asked, asked, "Tall Ships 2016")
    assert source.facts(1) == {"answers": ["Tall Ships 2016"]}
    # two questions and one answer
    with pytest.raises(BadRecordError, match=r"`answer` is missing; the keys are answers, image_id"):
        source.record(4)


def test_textvqa_with_the_words_that_were_read() -> None:
    path = "textvqa/TextVQA_0.5.1_val.json"
    asked = "what is the brand of this camera?"
    plain = opened("textvqa", path)
    assert shown(plain) == ("34602", ("003a8ae2ef43b901.jpg",), asked, asked, "nokia")
    assert plain.facts(0)["answers"] == ["nokia"] * 6 + ["toshiba"] * 3 + [""]
    read = opened("textvqa", path, ocr_tokens=OCR_FILE, instructions="mocle_eval_ocr")
    assert shown(read)[3] == f"OCR tokens: NOKIA, N-Gage, 2003. Question: {asked} Short answer:"
    # LAVIS takes the first 30
    words = ", ".join(f"w{number}" for number in range(30))
    assert shown(read, 1)[3].startswith(f"OCR tokens: {words}. Question: ")


def test_textcaps_with_the_words_that_were_read() -> None:
    path = "textcaps/TextCaps_0.1_train.json"
    source = opened("textcaps", path, ocr_tokens=OCR_FILE, instructions="mocle_ocrcaps")
    # an image without words has none to name
    assert [shown(source, index)[3][:22] for index in range(2)] == ["OCR tokens: . A short ", "OCR tokens: w0, w1, w2"]
    assert source.record(0).turns[1].text == "Five Listerine Zero mouthwash bottles on a store shelf"
    grouped = opened("textcaps", path, ocr_tokens=OCR_FILE, instructions="mocle_ocrcaps", for_evaluation=True)
    assert len(grouped.facts(0)["references"]) == 2
    assert "w29." in shown(grouped, 1)[3]


def test_words_of_other_images_are_told(tmp_path: Path) -> None:
    others = tmp_path / "ocr.json"
    others.write_text(json.dumps({"data": [{"image_id": "none", "ocr_tokens": []}]}))
    with pytest.raises(DataFileError, match=r"ocr\.json: has the words of no image of .*; are they one split's"):
        opened("textvqa", "textvqa/TextVQA_0.5.1_val.json", ocr_tokens=str(others))
    entries = [{"image_id": "003a8ae2ef43b901", "ocr_tokens": "NOKIA"}]
    others.write_text(json.dumps({"data": entries}))
    source = opened("textvqa", "textvqa/TextVQA_0.5.1_val.json", ocr_tokens=str(others))
    for index, reason in enumerate(('ocr_tokens is a string: "NOKIA"', "ocr_tokens is null")):
        with pytest.raises(BadRecordError, match=reason):
            source.record(index)
    others.write_text(json.dumps({"data": [{"ocr_tokens": []}]}))
    with pytest.raises(DataFileError, match=r"data\[0\] is an object: .* with an image_id"):
        opened("textvqa", "textvqa/TextVQA_0.5.1_val.json", ocr_tokens=str(others))


def test_iconqa() -> None:
    where = {"split": "test", "ques_type": "choose_txt"}
    source = opened("iconqa", "iconqa/problems.json", where=where, instructions="mocle_eval_choice")
    asked = "How likely is it that you will pick a black one?"
    words = f"Question: {asked} Options: (a) certain (b) unlikely (c) impossible (d) probable. Short answer:"
    assert len(source) == 1
    assert shown(source) == ("1", ("test/choose_txt/1/image.png",), asked, words, "impossible")
    assert source.facts(0) == {"options": ["certain", "unlikely", "impossible", "probable"]}
    # a right choice written as text
    assert shown(opened("iconqa", "iconqa/problems.json"), 2)[4] == "3"


def test_scienceqa_with_its_context() -> None:
    where = {"split": ["test", "train"], "image": "image.png"}
    source = opened("scienceqa", "scienceqa/problems.json", where=where, instructions="mocle_eval_science")
    assert len(source) == 2
    _, images, question, words, answer = shown(source)
    assert (images, answer) == (("test/5/image.png",), "if the water boiled")
    assert question == "Which of these could Kathleen's test show?"
    assert words == (
        "Context: People can use the engineering-design process. Question: Which of these could Kathleen's test show? "
        "Options: (a) if the spaghetti would have fully cooked (b) if the water boiled. Answer:"
    )
    assert shown(source, 1)[3].startswith("Context:  Question: Which of these states")


def test_vqa_rad() -> None:
    path = "vqa_rad/VQA_RAD Dataset Public.json"
    source = opened("vqa_rad", path)
    asked = "Are regions of the brain infarcted?"
    assert shown(source) == ("0", ("synpic54610.jpg",), asked, asked, "Yes")
    assert source.facts(0) == {"answers": ["Yes"]}
    assert shown(source, 2)[4] == "3"
    test = {"phrase_type": ["test_freeform", "test_para"]}
    assert [shown(opened("vqa_rad", path, where=test | {"answer_type": kind}))[0] for kind in ("OPEN", "CLOSED ")] == [
        "1",
        "2",
    ]


def test_slake_in_one_language() -> None:
    source = opened("slake", "slake/test.json", where={"q_lang": "en"})
    assert len(source) == 1
    asked = "What scanning plane does this image belong to?"
    assert shown(source) == ("2725", ("xmlab384/source.jpg",), asked, asked, "Coronal Plane")


def test_flickr30k_is_read_as_karpathys_coco() -> None:
    source = opened(
        "coco_captions", "flickr30k/flickr30k_test.json", for_evaluation=True, instructions="mocle_eval_caption"
    )
    assert shown(source)[1:4] == (("flickr30k-images/1007129816.jpg",), None, "A short image description:")
    assert len(source.facts(0)["references"]) == 2


PATHVQA = [
    {"image": "train_0422", "question": "Where are liver stem cells located?", "answer": "in the canals of hering"},
    {"image": "train_0422", "question": "Is it a liver?", "answer": "yes"},
]


@pytest.mark.parametrize("name", ["train_qa.pkl", "train_qa.json"])
def test_pathvqa(tmp_path: Path, name: str) -> None:
    content = pickle.dumps(PATHVQA) if name.endswith(".pkl") else json.dumps(PATHVQA).encode()
    (tmp_path / name).write_bytes(content)
    source = opened("pathvqa", str(tmp_path / name))
    asked = "Where are liver stem cells located?"
    assert shown(source) == ("train_0422", ("train_0422.jpg",), asked, asked, "in the canals of hering")
    for kind, wanted in (("OPEN", asked), ("CLOSED", "Is it a liver?")):
        part = opened("pathvqa", str(tmp_path / name), where={"answer_type": kind})
        assert [part.record(index).question for index in range(len(part))] == [wanted]


class Runs:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([Runs()]), r"which could run code"),
        (pickle.dumps(PATHVQA)[:-9], "cannot be read as a pickle"),
        (b"", "cannot be read as a pickle"),
        (pickle.dumps({"a": 1}), "holds an object with a; allowed is a list"),
        (pickle.dumps([b"bytes"]), "cannot be read as a pickle .*bytes"),
        (None, "does not exist; give PathVQA's"),
    ],
)
def test_pickles_are_read_without_running_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "qa.pkl").write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        opened("pathvqa", str(tmp_path / "qa.pkl"))
    assert not (tmp_path / "ran").exists()


def test_questions_are_asked_for_by_their_answer() -> None:
    more = {"annotations": "vqa/v2_mscoco_train2014_annotations.json", "instructions": "mocle_vqg"}
    source = opened("vqa", "vqa/v2_OpenEnded_mscoco_train2014_questions.json", **more)
    asked = "What is this photo taken looking through?"
    words = "Given the image, generate a question whose answer is: net. Question:"
    # no bare question, which a connector would read
    assert shown(source)[2:] == (None, words, asked)
    assert source.facts(0) == {"answers": [asked]}
    drawn = {source.record(0, draw).turns for draw in range(400)}
    assert {answer.text for _, answer in drawn} == {asked}
    assert len(drawn) == 6 * 3  # templates, answers
    assert {human.text.removeprefix("<image>\n") for human, _ in drawn} == set(source.instructions(0))


def test_all_instructions_that_a_record_can_give() -> None:
    source = opened("aokvqa", "aokvqa/aokvqa_v1p0_train.json", instructions="mocle_vqamc")
    asked = "What is the man by the bags awaiting?"
    options = "(a) skateboarder (b) train (c) delivery (d) cab"
    found = source.instructions(0)
    assert len(found) == 10
    # table 16 shows these forms
    assert f"Q: {asked} Options: {options}, A:" in found
    assert f"Question: {asked} Options: {options}, Short answer:" in found
    assert f"{asked} Options: {options}" in found
    drawn = {source.record(0, draw).turns[0].text.removeprefix("<image>\n") for draw in range(300)}
    assert drawn == set(found)


def test_options_have_letters() -> None:
    assert lettered(("x", "y")) == "(a) x (b) y"
    assert lettered(()) == ""
    assert lettered([str(number) for number in range(28)]).endswith("(z) 25 (aa) 26 (ab) 27")


def test_the_sets_are_those_of_tables_10_and_11() -> None:
    sizes = {name: len(templates) for name, templates in INSTRUCTION_SETS.items() if name.startswith("mocle_")}
    training = {"mocle_cap": 13, "mocle_vqa": 10, "mocle_vqg": 6, "mocle_ocrcaps": 13, "mocle_vqamc": 10}
    assert sizes == training | {
        f"mocle_eval_{name}": 1 for name in ("vqa", "choice", "caption", "ocr", "science", "statement")
    }
    for templates in INSTRUCTION_SETS.values():
        assert len(set(templates)) == len(templates)
    # the options stand behind the question, and nothing else changes but a comma
    for with_options, without in zip(INSTRUCTION_SETS["mocle_vqamc"], INSTRUCTION_SETS["mocle_vqa"], strict=True):
        assert with_options.replace(" Options: {OPTIONS},", "").replace(" Options: {OPTIONS}", "") == without
    assert INSTRUCTION_SETS["mocle_vqa"][6].format(QUESTION="what color is the cat?") == (
        "Based on the image, respond to this question with a short answer: what color is the cat?. Answer:"
    )  # table 16, cluster 2


def test_only_records_with_some_values() -> None:
    train = opened("ocrvqa", "ocrvqa/dataset.json", where={"split": 1})
    assert [train.record(index).id for index in range(len(train))] == [f"1435206010/{place}" for place in range(3)]
    with pytest.raises(
        DataFileError, match=r"where: split 7 or 8: no record is so; values that there are: split: 1, 2, 3"
    ):
        opened("ocrvqa", "ocrvqa/dataset.json", where={"split": [7, 8]})
    with pytest.raises(DataFileError, match=r"where: splits 1: .* splits: none"):
        opened("ocrvqa", "ocrvqa/dataset.json", where={"splits": 1})
    # a text is not a number
    with pytest.raises(DataFileError, match="no record is so"):
        opened("ocrvqa", "ocrvqa/dataset.json", where={"split": "1"})


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_some_of_llavas_records(tmp_path: Path, suffix: str) -> None:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate("abcd")]
    records = [{"id": number, "kind": "xy"[number % 2], "conversations": turns} for number in range(4)]
    text = json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records))
    (tmp_path / f"r{suffix}").write_text(text)
    found = opened("llava_json", str(tmp_path / f"r{suffix}"), where={"kind": ["y"]})
    assert [found.record(index).id for index in range(len(found))] == ["1", "3"]
    assert len(found.record(0).turns) == 4
    first = opened("llava_json", str(tmp_path / f"r{suffix}"), turns="first")
    assert [turn.text for turn in first.record(0).turns] == ["a", "b"]
    assert (first.instructions(0), found.instructions(0)) == (("a",), ("a",))


def test_an_image_of_a_later_turn_is_not_the_first_turns(tmp_path: Path) -> None:
    turns = [
        {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(["a", "b", "<image>", "d"])
    ]
    (tmp_path / "r.json").write_text(json.dumps([{"image": "i.png", "conversations": turns}]))
    with pytest.raises(BadRecordError, match="<image> stands in a later turn"):
        opened("llava_json", str(tmp_path / "r.json"), turns="first").record(0)


def test_settings_with_values_to_choose_by_can_be_keys() -> None:
    one, two = (RecordsSettings.model_validate({"path": "r.json", "where": {"a": value}}) for value in (1, [1]))
    assert {one: "found"}[two] == "found"
    assert one != RecordsSettings.model_validate({"path": "r.json", "where": {"a": 2}})


VQA = {"source": "vqa", "path": "q.json", "annotations": "a.json"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (VQA | {"ocr_tokens": "o.json"}, "ocr_tokens: only textcaps and textvqa take it"),
        (VQA | {"instructions": ["{QUESTION} {OPTIONS}"]}, r"has the field {OPTIONS}; allowed: {QUESTION}, {ANSWER}"),
        (VQA | {"instructions": ["{QUESTION} {ANSWER}"]}, "gives the answer away"),
        (VQA | {"instructions": "mocle"}, "'mocle'; allowed: vqa, choice, caption, mocle_cap"),
        (VQA | {"turns": "first"}, "turns: a record of source vqa is one question"),
        (VQA | {"where": {"split": []}}, "split: no value; at least one"),
        (
            {"source": "textvqa", "path": "q.json", "instructions": "mocle_eval_ocr"},
            r"has the field {OCR_TOKENS}; allowed: {QUESTION}, {ANSWER} .*{OCR_TOKENS} needs ocr_tokens",
        ),
        ({"source": "textcaps", "path": "q.json", "instructions": "mocle_vqg"}, r"has the field {ANSWER}"),
        ({"source": "iconqa", "path": "q.json", "instructions": "mocle_eval_science"}, r"has the field {CONTEXT}"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecordsSettings.model_validate(settings)
