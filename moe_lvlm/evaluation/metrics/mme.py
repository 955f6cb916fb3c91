"""MME: two yes-or-no questions about each image, in fourteen categories."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from moe_lvlm.evaluation.metrics.outcome import Metric, Outcome, Truth, best_constant, one_by_one
from moe_lvlm.evaluation.metrics.yes_no import read_label

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = PERCEPTION + COGNITION
QUESTIONS_PER_IMAGE = 2


def read_mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """What a free answer counts as: what its first four characters hold, in lower case: yes, else no, else other.

    Source: MME's calculation script (Fu et al. 2023). Space before the answer is no part of it.
    """
    start = text.strip().lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def category_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """accuracy: the share of right answers. accuracy_plus: the share of images both of whose questions are answered
    right. score: 100 (accuracy + accuracy_plus), 200 at most (MME: Fu et al. 2023)."""
    by_image: defaultdict[tuple[str | None, str | None], list[float]] = defaultdict(list)
    for outcome in outcomes:
        by_image[_image(outcome.truth)].append(_credit(outcome.prediction, outcome.truth))
    accuracy = sum(map(sum, by_image.values())) / len(outcomes)
    accuracy_plus = sum(min(credits) for credits in by_image.values()) / len(by_image)
    return {"accuracy": accuracy, "accuracy_plus": accuracy_plus, "score": 100 * (accuracy + accuracy_plus)}


def _image(truth: Truth) -> tuple[str | None, str | None]:
    return truth.category, truth.image


def _credit(prediction: str, truth: Truth) -> float:
    return float(read_mme_answer(prediction) == read_label(truth.answer))


def _details(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Sums over categories are there only if all of them are: a part of a sum would read like a low one."""
    by_category: defaultdict[str | None, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_category[outcome.truth.category].append(outcome)
    scores = {name: category_scores(by_category[name]) for name in CATEGORIES if name in by_category}
    found = {
        "accuracy_plus": category_scores(outcomes)["accuracy_plus"],
        "other": sum(read_mme_answer(outcome.prediction) == "other" for outcome in outcomes) / len(outcomes),
    }
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if all(member in scores for member in members):
            found[name] = sum(scores[member]["score"] for member in members)
    for category, numbers in scores.items():
        found |= {f"{category}/{name}": value for name, value in numbers.items()}
    return found


def _check(truth: Truth) -> None:
    read_label(truth.answer)
    if truth.category not in CATEGORIES:
        shown = "missing" if truth.category is None else repr(truth.category)
        raise ValueError(f"category: {shown}; allowed: {', '.join(CATEGORIES)}")
    if truth.image is None:
        raise ValueError("image: missing; MME's questions are counted by image")


def _check_set(truths: Sequence[Truth]) -> None:
    for (category, image), count in Counter(map(_image, truths)).items():
        if count != QUESTIONS_PER_IMAGE:
            raise ValueError(
                f"image {image!r} of category {category!r} has {count} question(s); allowed: exactly "
                f"{QUESTIONS_PER_IMAGE} (a limit must not part them)"
            )


MME = Metric(
    credits=one_by_one(_credit),
    majority=best_constant(lambda truth: {read_label(truth.answer): 1.0}),
    check=_check,
    check_set=_check_set,
    details=_details,
)
