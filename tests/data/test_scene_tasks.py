"""The pack scene_tasks: records against the truth of each picture, and checkpoints in InstructBLIP's published layout."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from moe_lvlm.config.instructions import INSTRUCTION_SETS
from moe_lvlm.data.packs import SHIPPED, unpack

SPLITS = ("train", "val")
MODELS = {"instructblip_llama": LlamaForCausalLM, "instructblip_t5": T5ForConditionalGeneration}
NAMES = [
    "cat",
    "dog",
    "bear",
    "frog",
    "pig",
    "cow",
    "apple",
    "banana",
    "carrot",
    "pizza",
    "car",
    "bus",
    "airplane",
    "house",
    "key",
    "star",
]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "gray", "white"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
IMAGES = {"train": 2400, "val": 600}


class Files(NamedTuple):
    """What the published files of one split hold."""

    coco: dict[str, Any]
    questions: dict[str, Any]
    annotations: dict[str, Any]
    aokvqa: list[dict[str, Any]]
    textcaps: dict[str, Any]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("scene_tasks", cache=tmp_path_factory.mktemp("cache"))


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def files(pack: Path) -> dict[str, Files]:
    return {
        split: Files(
            load(pack / f"coco/captions_{split}2014.json"),
            load(pack / f"vqav2/v2_OpenEnded_mscoco_{split}2014_questions.json"),
            load(pack / f"vqav2/v2_mscoco_{split}2014_annotations.json"),
            load(pack / f"aokvqa/aokvqa_v1p0_{split}.json"),
            load(pack / f"textcaps/TextCaps_0.1_{split}.json"),
        )
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def truths(pack: Path) -> dict[int, dict[str, Any]]:
    return {truth["image_id"]: truth for truth in load(pack / "truths.json")}


@pytest.fixture(scope="module", params=MODELS)
def model_folder(pack: Path, request: pytest.FixtureRequest) -> Path:
    return pack / str(request.param)


# --- the pack ---------------------------------------------------------------------------------------------------------


def test_the_pack_is_small() -> None:
    size = sum(path.stat().st_size for path in (SHIPPED / "scene_tasks").rglob("*") if path.is_file())
    assert size < 9 * 2**20


def test_the_pack_names_its_sources_and_licences(pack: Path) -> None:
    said = (pack / "LICENSES.md").read_text()
    for name in ("Twemoji", "CC-BY 4.0", "Noto Emoji", "Apache-2.0", "Fluent Emoji", "MIT License"):
        assert name in said, name


def test_the_manifest_counts_what_is_there(pack: Path, files: dict[str, Files]) -> None:
    counts = load(pack / "pack.json")["counts"]
    expected = {"truths.json": sum(IMAGES.values())}
    for split, held in files.items():
        expected |= {
            f"coco/captions_{split}2014.json": len(held.coco["annotations"]),
            f"vqav2/v2_OpenEnded_mscoco_{split}2014_questions.json": len(held.questions["questions"]),
            f"aokvqa/aokvqa_v1p0_{split}.json": len(held.aokvqa),
            f"textcaps/TextCaps_0.1_{split}.json": len(held.textcaps["data"]),
        }
        assert len(held.annotations["annotations"]) == len(held.questions["questions"])
    assert counts["records"] == expected
    assert {"train": counts["train_images"], "val": counts["val_images"]} == IMAGES


def test_no_held_out_picture_is_among_those_to_learn_from(pack: Path, truths: dict[int, dict[str, Any]]) -> None:
    pixels = defaultdict(set)
    for path in (pack / "images").iterdir():
        with Image.open(path) as opened:
            assert (opened.size, opened.mode) == ((48, 48), "RGB")
            pixels[path.name.split("_")[1]].add(np.asarray(opened).tobytes())
    assert {name.removesuffix("2014"): len(found) for name, found in pixels.items()} == IMAGES
    assert not pixels["train2014"] & pixels["val2014"]
    assert {truth["file_name"] for truth in truths.values()} == {path.name for path in (pack / "images").iterdir()}


# --- the truth and the pixels -----------------------------------------------------------------------------------------


def quadrant(image: np.ndarray, place: str) -> np.ndarray:
    vertical, horizontal = place.split()
    rows = slice(0, 24) if vertical == "top" else slice(24, 48)
    return image[rows, slice(0, 24) if horizontal == "left" else slice(24, 48)].astype(float)


def test_signs_are_where_the_truth_says(pack: Path, truths: dict[int, dict[str, Any]]) -> None:
    """A board has two paints only, and is 24 pixels wide: mostly more of a quadrant than any emoji has of such colours.
    Chance is a quarter."""
    right = []
    for truth in list(truths.values())[: IMAGES["train"] : 8]:
        if truth["sign"] is None:
            continue
        image = np.asarray(Image.open(pack / "images" / truth["file_name"]))
        pairs = [((0, 0, 0), (255, 255, 255)), ((200, 20, 30), (255, 255, 255)), ((255, 235, 60), (20, 30, 90))]
        shares = {}
        for place in PLACES:
            pixels = quadrant(image, place).reshape(-1, 3)
            near = [np.minimum(*(np.abs(pixels - paint).max(1) for paint in pair)) < 48 for pair in pairs]
            shares[place] = max(one.mean() for one in near)
        right.append(max(shares, key=shares.__getitem__) == truth["sign"]["place"])
    assert len(right) > 100
    assert np.mean(right) > 0.7


def test_the_same_word_looks_alike_and_others_do_not(pack: Path, truths: dict[int, dict[str, Any]]) -> None:
    """The word read by the nearest of the other signs with the same paints, board found as the brightest contrast."""
    boards: list[tuple[str, np.ndarray]] = []
    for truth in truths.values():
        if truth["sign"] is None or len(boards) == 300:
            continue
        image = np.asarray(Image.open(pack / "images" / truth["file_name"]))
        grey = quadrant(image, truth["sign"]["place"]).mean(2)
        # the board's 13 rows are those with the most dark and light in them
        top = int(np.argmax([grey[row : row + 13].std() for row in range(12)]))
        board = grey[top : top + 13] > grey[top : top + 13].mean()
        board = board if board.mean() < 0.5 else ~board
        boards.append((truth["sign"]["word"], board))
    right = []
    for place, (word, board) in enumerate(boards):
        others = [(np.mean(other != board), name) for number, (name, other) in enumerate(boards) if number != place]
        right.append(min(others)[1] == word)
    assert len({word for word, _ in boards}) == 12
    assert np.mean(right) > 0.8


# --- what is asked and answered -------------------------------------------------------------------------------------


def expected_answers(truth: dict[str, Any], question: str) -> set[str]:
    """All answers that the picture gives to a question."""
    objects = truth["objects"]
    if question == "What color is the background?":
        return {truth["background"]}
    if question == "How many objects are there?":
        return {str(len(objects))}
    if found := re.fullmatch(r"What is at the (.+)\?", question):
        return {one["name"] for one in objects if one["place"] == found[1]}
    if found := re.fullmatch(r"Where is the (.+)\?", question):
        return {one["place"] for one in objects if one["name"] == found[1]}
    assert question == "Which object is in the image?"
    return {one["name"] for one in objects}


def test_vqa_records_have_the_published_layout_and_the_one_right_answer(
    pack: Path, files: dict[str, Files], truths: dict[int, dict[str, Any]]
) -> None:
    for split, held in files.items():
        assert held.questions["data_subtype"] == held.annotations["data_subtype"] == f"{split}2014"
        by_id = {one["question_id"]: one for one in held.annotations["annotations"]}
        asked = held.questions["questions"]
        assert len(by_id) == len(asked) and by_id.keys() == {one["question_id"] for one in asked}
        for one in asked:
            annotation = by_id[one["question_id"]]
            assert annotation["image_id"] == one["image_id"]
            (right,) = expected_answers(truths[one["image_id"]], one["question"])
            assert annotation["multiple_choice_answer"] == right
            assert [answer["answer"] for answer in annotation["answers"]] == [right] * 10
            assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
            assert one["question"].lower().startswith(annotation["question_type"])
            assert annotation["answer_type"] == ("number" if right.isdigit() else "other")
            assert (pack / "images" / f"COCO_{split}2014_{one['image_id']:012d}.webp").is_file()
        assert len({(one["image_id"], one["question"]) for one in asked}) == len(asked)
        shares = Counter(one["question_type"] for one in held.annotations["annotations"])
        assert len(shares) == 4
        # a name that occurs twice or thrice has no one place
        assert max(shares.values()) < 1.4 * min(shares.values()), shares


def test_choices_hold_one_right_answer_among_four(
    pack: Path, files: dict[str, Files], truths: dict[int, dict[str, Any]]
) -> None:
    for split, held in files.items():
        assert len({one["question_id"] for one in held.aokvqa}) == len(held.aokvqa)
        for one in held.aokvqa:
            assert one["split"] == split
            assert len(set(one["choices"])) == 4
            right = expected_answers(truths[one["image_id"]], one["question"])
            assert [choice in right for choice in one["choices"]].count(True) == 1
            assert one["choices"][one["correct_choice_idx"]] in right
            assert len(one["direct_answers"]) == 10 and set(one["direct_answers"]) == right
            assert (pack / "images" / f"COCO_{split}2014_{one['image_id']:012d}.webp").is_file()
        places = Counter(one["correct_choice_idx"] for one in held.aokvqa)
        assert max(places.values()) < 0.32 * len(held.aokvqa)


def test_captions_say_what_is_there(pack: Path, files: dict[str, Files], truths: dict[int, dict[str, Any]]) -> None:
    for split, held in files.items():
        images = {one["id"]: one for one in held.coco["images"]}
        captions = defaultdict(list)
        for one in held.coco["annotations"]:
            captions[one["image_id"]].append(one["caption"])
        assert images.keys() == captions.keys()
        for image_id, texts in captions.items():
            truth = truths[image_id]
            assert images[image_id]["file_name"] == truth["file_name"]
            assert truth["file_name"].startswith(f"COCO_{split}2014_")
            assert truth["sign"] is None and len(set(texts)) == 4
            for text in texts:
                words = text.split()
                assert [word for word in words if word in COLOURS] == [truth["background"]]
                assert Counter(word.strip(",") for word in words if word.strip(",") in NAMES) == Counter(
                    one["name"] for one in truth["objects"]
                )
                placed = re.findall(r"(\w+) at the (\w+ \w+)", text)
                assert placed in ([], [(one["name"], one["place"]) for one in truth["objects"]])


def test_sign_captions_read_the_sign(pack: Path, files: dict[str, Files], truths: dict[int, dict[str, Any]]) -> None:
    by_name = {truth["file_name"]: truth for truth in truths.values()}
    words = Counter[str]()
    for split, held in files.items():
        rows = held.textcaps["data"]
        assert len({row["caption_id"] for row in rows}) == len(rows)
        for row in rows:
            truth = by_name[f"{row['image_id']}.webp"]
            assert row["image_path"] == truth["file_name"] and row["set_name"] == split
            sign = truth["sign"]
            assert len(set(row["reference_strs"])) == 5 and row["caption_str"] in row["reference_strs"]
            for text in row["reference_strs"]:
                assert re.search(rf"\b(word|says) {sign['word']}\b", text)
                assert re.findall(r"at the (\w+ \w+)", text) in ([], [sign["place"]])
            words[sign["word"]] += 1
        captioned = {one["id"] for one in held.coco["images"]}
        read = {by_name[f"{row['image_id']}.webp"]["image_id"] for row in rows}
        # whether to read is told by the picture: the instructions are the same
        assert not captioned & read and len(captioned | read) == IMAGES[split]
    assert len(words) == 12


def all_texts(files: dict[str, Files]) -> Iterator[str]:
    for held in files.values():
        yield from (one["caption"] for one in held.coco["annotations"])
        yield from (text for row in held.textcaps["data"] for text in (row["caption_str"], *row["reference_strs"]))
        questions = [(one["question"], "") for one in held.questions["questions"]]
        questions += [(one["question"], ", ".join(one["choices"])) for one in held.aokvqa]
        for question, candidates in questions:
            for name in ("vqa", "choice"):
                for template in INSTRUCTION_SETS[name]:
                    yield template.format(QUESTION=question, CANDIDATES=candidates)
        for one in held.annotations["annotations"]:
            yield one["multiple_choice_answer"]
    yield from INSTRUCTION_SETS["caption"]


# --- the checkpoints --------------------------------------------------------------------------------------------------


def test_tokenizers_know_every_word(model_folder: Path, files: dict[str, Files]) -> None:
    for folder in (model_folder, model_folder / "qformer_tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.unk_token_id is not None
        words = {word for text in set(all_texts(files)) for word in text.split()}
        for ids in tokenizer(sorted(words)).input_ids:
            assert tokenizer.unk_token_id not in ids
        assert tokenizer.unk_token_id in tokenizer("xylophone").input_ids


def test_special_tokens_stand_where_instructblip_has_them(model_folder: Path) -> None:
    words = AutoTokenizer.from_pretrained(model_folder)
    said = words.convert_ids_to_tokens(words("A photo of").input_ids)
    llama = model_folder.name.endswith("llama")
    assert said == (["<s>", "a", "photo", "of"] if llama else ["a", "photo", "of", "</s>"])
    qformer = AutoTokenizer.from_pretrained(model_folder / "qformer_tokenizer")
    assert qformer.convert_ids_to_tokens(qformer("What is there?").input_ids) == [
        *("[CLS]", "what", "is", "there", "?", "[SEP]")
    ]
    assert qformer.cls_token == "[CLS]" and qformer.pad_token_id == words.pad_token_id == 0


class Loaded(NamedTuple):
    model: InstructBlipForConditionalGeneration
    processor: InstructBlipProcessor


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Loaded:
    model, said = InstructBlipForConditionalGeneration.from_pretrained(
        model_folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values()), said
    return Loaded(model.eval(), InstructBlipProcessor.from_pretrained(model_folder))


def test_checkpoints_have_the_published_layout(model_folder: Path, loaded: Loaded) -> None:
    model, processor = loaded
    assert isinstance(model.language_model, MODELS[model_folder.name])
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.num_query_tokens == processor.num_query_tokens == 8
    assert model.config.qformer_config.cross_attention_frequency == 2
    # a text FFN in every layer: of BLIP-2's Q-Former, which has none, routers could ask nothing
    assert all(hasattr(layer, "intermediate") for layer in model.qformer.encoder.layer)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.image_token_index == image
    batch = processor(images=Image.new("RGB", (48, 48)), text="A photo of", return_tensors="pt")
    assert batch["input_ids"][0, :8].tolist() == [image] * 8
    assert batch["pixel_values"].shape == (1, 3, 48, 48)


def say(loaded: Loaded, image: Path, text: str) -> str:
    model, processor = loaded
    with Image.open(image) as opened:
        batch = processor(images=opened, text=text, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=32, do_sample=False)[0]
    new = ids[batch["input_ids"].shape[1] :] if model.config.use_decoder_only_language_model else ids
    return str(processor.tokenizer.decode(new, skip_special_tokens=True))


def test_checkpoints_caption_pictures_that_they_have_not_seen(
    pack: Path, loaded: Loaded, truths: dict[int, dict[str, Any]]
) -> None:
    """Chance is one in eight for the ground; of sixteen names two thirds of two are rarely met by chance."""
    ground, names = [], []
    for truth in list(truths.values())[IMAGES["train"] :][:40]:
        said = say(loaded, pack / "images" / truth["file_name"], "A photo of")
        ground.append(f"{truth['background']} background" in said)
        names += [one["name"] in said.split() for one in truth["objects"]]
    assert np.mean(ground) > 0.9
    assert np.mean(names) > 0.7
