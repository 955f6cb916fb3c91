"""Records of the conflict (docs/mocle_claims.md): four datasets that ask the same about the same pictures of the pack
scenes, each in words of its own, and each with another answer.

An answer is the true one moved on by so many places in the list of all answers: 0 in `plain`, 1 in `image`, and so on. The
words are those that the pack's language model knows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scenes_records import conversation

from moe_lvlm.data.scenes import COLOURS, EMOJI

NUM_TRAIN = 2400  # pictures, of 6,000; one question about each, asked in every dataset
NUM_TEST = 150  # of 450
GROUND = "What color is the background?"
PLACE = "What is at the "
MARK = "<image>\n"


@dataclass(frozen=True, slots=True)
class Wording:
    """How a dataset asks; {} is a place. The last of each is kept for evaluation."""

    ground: tuple[str, ...]
    place: tuple[str, ...]


WORDINGS = {
    "plain": Wording(
        ground=(
            "What color is the background?",
            "What is the color?",
            "The background is what color?",
            "What is the background color?",
        ),
        place=("What is at the {}?", "What is there at the {}?", "At the {} is what?", "The {} is what?"),
    ),
    "image": Wording(
        ground=(
            "What color is the image?",
            "On the image, what color is there?",
            "The image is what color?",
            "What color is there on the image?",
        ),
        place=(
            "What is at the {} on the image?",
            "On the image, what is at the {}?",
            "At the {} on the image is what?",
            "The image at the {} is what?",
        ),
    ),
    "describe": Wording(
        ground=(
            "Describe the color.",
            "Describe the color on the background.",
            "Describe what color the background is.",
            "Describe the background color.",
        ),
        place=(
            "Describe the {}.",
            "Describe what is at the {}.",
            "Describe what there is at the {}.",
            "At the {}, describe what is there.",
        ),
    ),
    "objects": Wording(
        ground=(
            "What color are the objects on?",
            "The objects are on what color?",
            "What color is at the objects?",
            "On what color are the objects?",
        ),
        place=(
            "What objects are at the {}?",
            "The objects at the {} are what?",
            "At the {} are what objects?",
            "What are the objects at the {}?",
        ),
    ),
}
"""Dataset -> how it asks; the number of a dataset is by how many places its answers are moved on."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One question about a picture. place: None where it is about the ground."""

    image: str
    place: str | None
    answer: str

    def moved(self, places: int) -> str:
        """The answer so many places further on in the list."""
        answers = list(COLOURS if self.place is None else EMOJI)
        return answers[(answers.index(self.answer) + places) % len(answers)]


def read_facts(path: Path) -> dict[str, list[Fact]]:
    """Of each picture of a file of the pack scenes, what the file tells of its ground and places, in a fixed order."""
    facts: dict[str, set[Fact]] = defaultdict(set)
    for record in json.loads(path.read_text(encoding="utf-8")):
        turns = [turn["value"].removeprefix(MARK) for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if question == GROUND:
                facts[record["image"]].add(Fact(record["image"], None, answer))
            elif question.startswith(PLACE):
                place = question.removeprefix(PLACE).removesuffix("?")
                facts[record["image"]].add(Fact(record["image"], place, answer))
    return {image: sorted(found, key=lambda fact: fact.place or "") for image, found in sorted(facts.items())}


def draw_facts(facts: Mapping[str, Sequence[Fact]], count: int, rng: np.random.Generator) -> list[Fact]:
    """One of each of so many pictures, grounds and places turn about where a picture has both."""
    images = [list(facts)[index] for index in rng.permutation(len(facts))[:count]]
    drawn = []
    for number, image in enumerate(images):
        is_ground = number % 2 == 0
        fitting = [fact for fact in facts[image] if (fact.place is None) == is_ground] or facts[image]
        drawn.append(fitting[int(rng.integers(len(fitting)))])
    return drawn


def conflict_files(folder: Path, *, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The content of each file. folder: the pack scenes, unpacked.

    <dataset>.json to train on; `test.json` asks about pictures that nobody has seen in the words of training, `new.json` in
    words that are in no training file.
    """
    rng = np.random.default_rng([seed, 2])
    train = draw_facts(read_facts(folder / "train.json"), NUM_TRAIN, rng)
    test = draw_facts(read_facts(folder / "test.json"), NUM_TEST, rng)
    files: dict[str, list[dict[str, Any]]] = {}
    for places, name in enumerate(WORDINGS):
        files[f"{name}.json"] = [_record(fact, name, places, int(rng.integers(3)), "train") for fact in train]
    asked = list(enumerate(WORDINGS))
    files["test.json"] = [
        _record(fact, name, places, int(rng.integers(3)), "test") for places, name in asked for fact in test
    ]
    files["new.json"] = [_record(fact, name, places, 3, "new") for places, name in asked for fact in test]
    return files


def _record(fact: Fact, name: str, places: int, wording: int, kind: str) -> dict[str, Any]:
    asked = WORDINGS[name].ground[wording] if fact.place is None else WORDINGS[name].place[wording].format(fact.place)
    stem = Path(fact.image).stem
    return {
        "id": f"{kind}-{name}-{stem}",
        "image": fact.image,
        "dataset": name,
        "conversations": conversation([(asked, fact.moved(places))]),
    }
