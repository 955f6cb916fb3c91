"""Questions and captions of the pack scene_tasks, in the layouts in which COCO Captions, VQAv2, A-OKVQA and TextCaps are
published. Everything random comes from the NumPy generator that is handed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
from scene_tasks_truths import Truth

from moe_lvlm.data.scenes import COLOURS, EMOJI, MAX_OBJECTS, SIDE, Quadrant

QUESTIONS_AN_IMAGE = 3
# of the pictures that are held out: one question and one choice each
NUM_HELD_OUT_ASKED = 400
NUM_ANSWERS = 10
NUM_CHOICES = 4
ORIGIN = {"description": "moe_lvlm scene_tasks", "version": "1"}

Drawn = TypeVar("Drawn")


class Kind(StrEnum):
    """What a question asks for; the value is what VQAv2 calls question_type."""

    BACKGROUND = "what color is the"
    COUNT = "how many"
    WHAT = "what is at the"
    WHERE = "where is the"
    WHICH = "which object is"


@dataclass(frozen=True, slots=True)
class Asked:
    """wrong: answers of the same kind that do not hold."""

    kind: Kind
    question: str
    answer: str
    wrong: tuple[str, ...]

    def choices(self, rng: np.random.Generator) -> list[str]:
        """NUM_CHOICES answers in random order, the right one among them."""
        wrong = [self.wrong[index] for index in rng.permutation(len(self.wrong))[: NUM_CHOICES - 1]]
        return [[self.answer, *wrong][index] for index in rng.permutation(NUM_CHOICES)]


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of a split and what it shows. split: train or val."""

    image_id: int
    split: str
    truth: Truth

    @property
    def stem(self) -> str:
        return f"COCO_{self.split}2014_{self.image_id:012d}"

    @property
    def file_name(self) -> str:
        return f"{self.stem}.webp"


def draw(values: Sequence[Drawn], rng: np.random.Generator) -> Drawn:
    return values[int(rng.integers(len(values)))]


# --- what is asked and said -----------------------------------------------------------------------------------------


def open_questions(truth: Truth) -> list[Asked]:
    """Every question with one right answer. An emoji's place is asked for only if its name occurs once, and what is at
    a place only if there are different names: else the picture's one name would do."""
    held = [name for name, _ in truth.emoji]
    counts = [str(count) for count in range(MAX_OBJECTS + 2)]
    questions = [
        _asked(Kind.BACKGROUND, "What color is the background?", truth.colour, list(COLOURS)),
        _asked(Kind.COUNT, "How many objects are there?", str(len(held)), counts),
    ]
    for name, quadrant in truth.emoji:
        if len(set(held)) > 1:
            questions.append(_asked(Kind.WHAT, f"What is at the {quadrant}?", name, list(EMOJI)))
        if Counter(held)[name] == 1:
            questions.append(_asked(Kind.WHERE, f"Where is the {name}?", str(quadrant), [str(one) for one in Quadrant]))
    return questions


def choice_questions(truth: Truth) -> list[Asked]:
    """The same, and one that only choices give one right answer."""
    held = [name for name, _ in truth.emoji]
    absent = tuple(name for name in EMOJI if name not in held)
    which = [Asked(Kind.WHICH, "Which object is in the image?", name, absent) for name in dict.fromkeys(held)]
    return [*open_questions(truth), *which]


def _asked(kind: Kind, question: str, answer: str, answers: Sequence[str]) -> Asked:
    return Asked(kind, question, answer, tuple(other for other in answers if other != answer))


@dataclass(frozen=True, slots=True)
class Caption:
    """told: the phrases, without which it could not be written."""

    text: str
    told: tuple[str, ...]


def object_captions(truth: Truth) -> list[Caption]:
    """What people write of a picture without a sign."""
    placed = _listed([f"{_article(name)} at the {quadrant}" for name, quadrant in truth.emoji])
    named = _listed([_article(name) for name, _ in truth.emoji])
    ground = f"{_article(truth.colour)} background"
    with_places = (*(f"{name} {quadrant}" for name, quadrant in truth.emoji), f"{truth.colour} background")
    without = (*(name for name, _ in truth.emoji), f"{truth.colour} background")
    return [
        Caption(f"{placed} on {ground}", with_places),
        Caption(f"{ground} with {placed}", with_places),
        Caption(f"{named} on {ground}", without),
        Caption(f"{truth.colour} image of {named}", without),
    ]


def sign_captions(truth: Truth) -> list[Caption]:
    """What people who were asked to read write of a picture with a sign."""
    assert truth.sign is not None
    word, quadrant = truth.sign
    first, _ = truth.emoji[0]
    return [
        Caption(f"a sign that says {word}", (f"word {word}",)),
        Caption(f"the word {word} at the {quadrant}", (f"word {word} {quadrant}",)),
        Caption(f"a sign at the {quadrant} says {word}", (f"word {word} {quadrant}",)),
        Caption(
            f"the word {word} on {_article(truth.colour)} background", (f"word {word}", f"{truth.colour} background")
        ),
        Caption(f"a sign with the word {word} and {_article(first)}", (f"word {word}", first)),
    ]


def web_captions(truth: Truth) -> list[Caption]:
    """What stands beside pictures on the web: all that can be seen, every other time with places. They are in no
    record."""
    captions = []
    for has_places in (False, True):
        emoji = [f"{name} at the {quadrant}" if has_places else name for name, quadrant in truth.emoji]
        listed, told = _listed([_article(one) for one in emoji]), [one.replace(" at the", "") for one in emoji]
        if truth.sign is not None:
            word, quadrant = truth.sign
            listed += f" with the word {word} at the {quadrant}" if has_places else f" with the word {word}"
            told.append(f"word {word} {quadrant}" if has_places else f"word {word}")
        ground = f"{_article(truth.colour)} background"
        told.append(f"{truth.colour} background")
        captions += [Caption(f"{listed} on {ground}", tuple(told)), Caption(f"{ground} with {listed}", tuple(told))]
    return captions


def all_told(truth: Truth) -> list[str]:
    """The picture in phrases: one an emoji, the sign and the ground."""
    phrases = [f"{name} {quadrant}" for name, quadrant in truth.emoji]
    if truth.sign is not None:
        phrases.append(f"word {truth.sign[0]} {truth.sign[1]}")
    return [*phrases, f"{truth.colour} background"]


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# --- records --------------------------------------------------------------------------------------------------------


def record_files(shown: Sequence[Shown], split: str, rng: np.random.Generator) -> dict[str, Any]:
    """The content of each file of one split, under the file's published name.

    Training has QUESTIONS_AN_IMAGE open questions and as many with choices an image; val one of each about each of the
    first NUM_HELD_OUT_ASKED.
    """
    per_image, asked_of = (QUESTIONS_AN_IMAGE, shown) if split == "train" else (1, shown[:NUM_HELD_OUT_ASKED])
    questions = _draw_questions(asked_of, open_questions, per_image, rng)
    choices = _draw_questions(asked_of, choice_questions, per_image, rng)
    name = f"{split}2014"
    return {
        f"coco/captions_{name}.json": coco_captions([one for one in shown if one.truth.sign is None]),
        f"vqav2/v2_OpenEnded_mscoco_{name}_questions.json": vqa_questions(questions, name),
        f"vqav2/v2_mscoco_{name}_annotations.json": vqa_annotations(questions, name),
        f"aokvqa/aokvqa_v1p0_{split}.json": aokvqa(choices, split, rng),
        f"textcaps/TextCaps_0.1_{split}.json": textcaps([one for one in shown if one.truth.sign is not None], split),
    }


def _draw_questions(
    shown: Sequence[Shown], ask: Callable[[Truth], list[Asked]], per_image: int, rng: np.random.Generator
) -> list[tuple[Shown, Asked]]:
    """Different questions about each image, their kinds as often as each other as far as images answer them."""
    kinds = list(dict.fromkeys(asked.kind for one in shown for asked in ask(one.truth)))
    counts = Counter[Kind]()
    drawn = []
    for one in shown:
        left = ask(one.truth)
        for _ in range(per_image):
            rarest = min({asked.kind for asked in left}, key=lambda kind: (counts[kind], kinds.index(kind)))
            asked = draw([asked for asked in left if asked.kind is rarest], rng)
            counts[rarest] += 1
            left.remove(asked)
            drawn.append((one, asked))
            if not left:
                break
    return drawn


def coco_captions(shown: Sequence[Shown]) -> dict[str, Any]:
    texts = [(one, caption.text) for one in shown for caption in object_captions(one.truth)]
    return {
        "info": ORIGIN,
        "images": [
            {"id": one.image_id, "file_name": one.file_name, "height": SIDE, "width": SIDE, "license": 1}
            for one in shown
        ],
        "licenses": [{"id": 1, "name": "see LICENSES.md", "url": ""}],
        "annotations": [
            {"image_id": one.image_id, "id": number, "caption": text} for number, (one, text) in enumerate(texts, 1)
        ],
    }


def _question_ids(questions: Sequence[tuple[Shown, Asked]]) -> list[int]:
    """As in VQAv2: the image's id, and three digits."""
    counts = Counter[int]()
    ids = []
    for one, _ in questions:
        ids.append(one.image_id * 1000 + counts[one.image_id])
        counts[one.image_id] += 1
    return ids


def vqa_questions(questions: Sequence[tuple[Shown, Asked]], name: str) -> dict[str, Any]:
    return {
        "info": ORIGIN,
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": name,
        "license": {"name": "see LICENSES.md", "url": ""},
        "questions": [
            {"image_id": one.image_id, "question": asked.question, "question_id": question_id}
            for question_id, (one, asked) in zip(_question_ids(questions), questions, strict=True)
        ],
    }


def vqa_annotations(questions: Sequence[tuple[Shown, Asked]], name: str) -> dict[str, Any]:
    return {
        "info": ORIGIN,
        "data_type": "mscoco",
        "data_subtype": name,
        "license": {"name": "see LICENSES.md", "url": ""},
        "annotations": [
            {
                "question_type": str(asked.kind),
                "multiple_choice_answer": asked.answer,
                "answers": [
                    {"answer": asked.answer, "answer_confidence": "yes", "answer_id": number}
                    for number in range(1, NUM_ANSWERS + 1)
                ],
                "image_id": one.image_id,
                "answer_type": "number" if asked.kind is Kind.COUNT else "other",
                "question_id": question_id,
            }
            for question_id, (one, asked) in zip(_question_ids(questions), questions, strict=True)
        ],
    }


def aokvqa(questions: Sequence[tuple[Shown, Asked]], split: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    records = []
    for question_id, (one, asked) in zip(_question_ids(questions), questions, strict=True):
        choices = asked.choices(rng)
        held = list(dict.fromkeys(name for name, _ in one.truth.emoji))
        right = held if asked.kind is Kind.WHICH else [asked.answer]
        records.append(
            {
                "split": split,
                "image_id": one.image_id,
                "question_id": str(question_id),
                "question": asked.question,
                "choices": choices,
                "correct_choice_idx": choices.index(asked.answer),
                "direct_answers": [right[number % len(right)] for number in range(NUM_ANSWERS)],
                "difficult_direct_answer": len(right) > 1,
                "rationales": [],
            }
        )
    return records


def textcaps(shown: Sequence[Shown], split: str) -> dict[str, Any]:
    """A row a caption; each has all captions of its image as references, as in the published file."""
    rows: list[dict[str, Any]] = []
    for one in shown:
        texts = [caption.text for caption in sign_captions(one.truth)]
        for text in texts:
            rows.append(
                {
                    "image_id": one.stem,
                    "image_name": one.stem,
                    "image_path": one.file_name,
                    "image_width": SIDE,
                    "image_height": SIDE,
                    "set_name": split,
                    "caption_id": len(rows),
                    "caption_str": text,
                    "reference_strs": texts,
                }
            )
    return {"dataset_type": split, "dataset_name": "textcaps", "dataset_version": "0.1", "data": rows}


def truths_file(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """What each picture shows, for those who want to know why an answer is right."""
    return [{"image_id": one.image_id, "file_name": one.file_name, **one.truth.as_json()} for one in shown]
