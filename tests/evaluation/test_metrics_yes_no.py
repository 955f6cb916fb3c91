"""POPE's and MME's scores, by hand and beside scikit-learn."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from moe_lvlm.evaluation.metrics import METRICS, Outcome, Truth, score_by_task
from moe_lvlm.evaluation.metrics.mme import CATEGORIES, COGNITION, PERCEPTION, read_mme_answer
from moe_lvlm.evaluation.metrics.yes_no import YesNo, read_yes_no


@pytest.mark.parametrize(
    ("text", "counts_as"),
    [
        ("No", "no"),
        ("No, there is no dog.", "no"),
        ("There is not, I think", "no"),
        ("I see no cat", "no"),
        ("Yes. There is no dog", "yes"),  # the first sentence alone
        ("Yes", "yes"),
        ("NO", "yes"),  # as published: case counts,
        ("no!", "yes"),  # words end at spaces alone,
        ("maybe", "yes"),  # and what is no no is yes
        ("", "yes"),
    ],
)
def test_yes_or_no(text: str, counts_as: str) -> None:
    assert read_yes_no(text) == counts_as


@pytest.mark.parametrize(
    ("text", "counts_as"),
    [
        ("Yes", "yes"),
        (" yes, it is", "yes"),
        ("NO", "no"),
        ("No.", "no"),
        ("Not at all", "no"),
        ("knot", "no"),
        ("It is yes", "other"),  # beyond the fourth character
        ("", "other"),
    ],
)
def test_mme_answers(text: str, counts_as: str) -> None:
    assert read_mme_answer(text) == counts_as


def pope(rows: list[tuple[str, YesNo]], category: str | None = None) -> list[Outcome]:
    return [Outcome("pope", prediction, Truth(label, category=category)) for prediction, label in rows]


RANDOM: list[tuple[str, YesNo]] = [("Yes", "yes"), ("Yes", "yes"), ("No", "yes"), ("Yes", "no"), ("No", "no")]
POPULAR: list[tuple[str, YesNo]] = [("No", "yes"), ("Yes", "no"), ("Yes", "no")]


def test_pope_by_hand() -> None:
    score = score_by_task(pope(RANDOM, "random") + pope(POPULAR, "popular"), "yes_no")["pope"]
    # all: 2 hits, 5 said yes, 4 are yes -> precision 2/5, recall 2/4, F1 2 (1/5) / (9/10) = 4/9; right 3 of 8
    # random: hits 2, said 3, are 3 -> 2/3, 2/3, 2/3; right 3 of 5; popular: no hit, so all 0
    assert (score.accuracy, score.majority, score.n) == (3 / 8, 0.5, 8)
    assert score.details == pytest.approx(
        {
            "precision": 2 / 5,
            "recall": 1 / 2,
            "f1": 4 / 9,
            "yes_ratio": 5 / 8,
            "mean_f1": 1 / 3,
            "popular/accuracy": 0.0,
            "popular/precision": 0.0,
            "popular/recall": 0.0,
            "popular/f1": 0.0,
            "popular/yes_ratio": 2 / 3,
            "random/accuracy": 3 / 5,
            "random/precision": 2 / 3,
            "random/recall": 2 / 3,
            "random/f1": 2 / 3,
            "random/yes_ratio": 3 / 5,
        }
    )
    assert score_by_task(pope(RANDOM), "yes_no")["pope"].details.keys() == {"precision", "recall", "f1", "yes_ratio"}


answer = st.sampled_from(["yes", "no"])


@given(st.lists(st.tuples(answer, answer), min_size=1))
def test_pope_equals_scikit_learn(rows: list[tuple[Literal["yes", "no"], Literal["yes", "no"]]]) -> None:
    score = score_by_task(pope(list(rows)), "yes_no")["pope"]
    predictions, labels = zip(*rows, strict=True)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=["yes"], average="micro", zero_division=0
    )
    assert score.accuracy == pytest.approx(accuracy_score(labels, predictions))
    assert [score.details[name] for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])


def mme(category: str, *images: tuple[str, str]) -> list[Outcome]:
    """Two questions about each image, whose right answers are yes and no."""
    return [
        Outcome("mme", prediction, Truth(label, category=category, image=f"{category}/{number}.jpg"))
        for number, predictions in enumerate(images)
        for prediction, label in zip(predictions, ("Yes", "No"), strict=True)
    ]


def test_mme_by_hand() -> None:
    # existence: 5 of 6 right, 2 of 3 images -> 100 (5/6 + 2/3) = 150; count: 1 of 2 right, no image -> 50
    outcomes = mme("existence", ("Yes", "No"), ("Yes", "No"), ("Yes", "Yes")) + mme("count", ("maybe", "no"))
    score = score_by_task(outcomes, "mme")["mme"]
    assert (score.accuracy, score.majority, score.n) == (6 / 8, 0.5, 8)
    assert score.details == pytest.approx(
        {
            "accuracy_plus": 2 / 4,
            "other": 1 / 8,
            "existence/accuracy": 5 / 6,
            "existence/accuracy_plus": 2 / 3,
            "existence/score": 150.0,
            "count/accuracy": 1 / 2,
            "count/accuracy_plus": 0.0,
            "count/score": 50.0,
        }
    )


def test_mme_sums_by_hand() -> None:
    assert (len(PERCEPTION), len(COGNITION), len(set(CATEGORIES))) == (10, 4, 14)
    outcomes = [outcome for category in PERCEPTION for outcome in mme(category, ("Yes", "No"))]
    outcomes += mme(COGNITION[0], ("Yes", "Yes"))
    details = score_by_task(outcomes, "mme")["mme"].details
    # 200 a category; cognition lacks three of its four
    assert details["perception"] == pytest.approx(2000)
    assert "cognition" not in details
    outcomes += [outcome for category in COGNITION[1:] for outcome in mme(category, ("no", "no"))]
    details = score_by_task(outcomes, "mme")["mme"].details
    assert details["cognition"] == pytest.approx(4 * 50)


def test_questions_about_one_image_need_not_stand_side_by_side() -> None:
    outcomes = mme("OCR", ("Yes", "No"), ("Yes", "Yes"))
    apart = [outcomes[0], outcomes[2], outcomes[1], outcomes[3]]
    assert score_by_task(apart, "mme") == score_by_task(outcomes, "mme")


@pytest.mark.parametrize(
    ("metric", "truth", "message"),
    [
        ("yes_no", Truth("a dog"), "the answer is 'a dog'; allowed: yes and no"),
        ("mme", Truth("maybe", category="OCR", image="1.png"), "allowed: yes and no"),
        ("mme", Truth("yes", image="1.png"), "category: missing; allowed: existence, count"),
        ("mme", Truth("yes", category="ocr", image="1.png"), "category: 'ocr'; allowed: existence"),
        ("mme", Truth("yes", category="OCR"), "image: missing"),
    ],
)
def test_records_that_cannot_be_scored(metric: str, truth: Truth, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METRICS[metric].check(truth)


def test_sets_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="category: 1 of 2 records"):
        METRICS["yes_no"].check_set([Truth("yes", category="random"), Truth("no")])
    pair = [outcome.truth for outcome in mme("OCR", ("Yes", "No"))]
    METRICS["mme"].check_set(pair)
    for truths, count in ((pair[:1], 1), (pair + pair[:1], 3)):
        with pytest.raises(ValueError, match=rf"image 'OCR/0.jpg' of category 'OCR' has {count} question\(s\)"):
            METRICS["mme"].check_set(truths)
