"""VQA accuracy: the published formula and the published normal form, by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lvlm.evaluation.metrics import METRICS, Outcome, TaskScore, Truth, score_by_task
from moe_lvlm.evaluation.metrics.vqa import normalize_vqa_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat", "cat"),  # case, spaces, articles
        ("a cat and an owl", "cat and owl"),
        ("a", ""),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("red, white", "red white"),
        ("really?", "really"),
        ("St. John.", "st john"),
        ("3.50", "3.50"),
        (".5", ".5"),
        ("5.", "5"),
        ("coca-cola", "coca cola"),  # the mark touches no space, so it becomes one
        ("coca -cola", "coca cola"),  # here it does, and goes
        ("a-b c- d", "ab c d"),  # one place is enough, for all places of the mark
        ("10:30", "10:30"),  # colons stay
        ("50%", "50%"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("who's", "who 's"),
        ("whos", "who's"),
        ("stop\nsign\t", "stop sign"),
        ("\tOne\n", "1"),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalize_vqa_answer(text) == normal


def by_subsets(prediction: str, answers: list[str]) -> float:
    """The formula as it is written: min(1, m / 3) for each nine of ten people, then the mean."""
    scores = [min(1.0, nine.count(prediction) / 3) for nine in combinations(answers, 9)]
    return sum(scores) / len(scores)


# people of ten who gave the answer, and what it gets: with three of them, leaving one of the three out leaves two
# (2/3), leaving another out leaves three (1): (3 x 2/3 + 7 x 1) / 10 = .9
@pytest.mark.parametrize(("people", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_hand(people: int, expected: float) -> None:
    answers = ["cat"] * people + ["dog"] * (10 - people)
    assert vqa_accuracy("A cat.", answers) == pytest.approx(expected, abs=1e-12)
    assert by_subsets("cat", answers) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.sampled_from(["cat", "dog", "bird"]), min_size=10, max_size=10))
def test_accuracy_is_the_mean_over_nine_of_ten(answers: list[str]) -> None:
    for prediction in ("cat", "dog", "bird", "fish"):
        assert vqa_accuracy(prediction, answers) == pytest.approx(by_subsets(prediction, answers), abs=1e-12)


def test_people_who_write_the_same_differently_agree() -> None:
    assert vqa_accuracy("2", ["two", "Two.", "2", "the 2", *["three"] * 6]) == 1.0


def test_score_by_hand() -> None:
    one = Truth("cat", answers=("cat",) * 3 + ("dog",) * 7)
    two = Truth("cat", answers=("cat",) * 10)
    outcomes = [Outcome("text", "cat", one), Outcome("text", "dog", two)]
    # .9 and 0; always "cat" gets .9 + 1, always "dog" 1 + 0
    assert score_by_task(outcomes, "vqa") == {
        "text": TaskScore(accuracy=pytest.approx(0.45), majority=pytest.approx(0.95), n=2)
    }


# what LAVIS (lavis/tasks/vqa.py, GQATask) gives for these
@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Yes.", "yes", 1.0),
        ("the left", "left", 1.0),
        ("A man", "man", 1.0),
        ("two", "2", 1.0),
        ("lady's room", "lady's room", 1.0),
        ("men", "man", 0.0),
        ("no, it is", "no", 0.0),
        ("blue", "light blue", 0.0),
        ("", "yes", 0.0),
    ],
)
def test_one_right_answer(prediction: str, answer: str, expected: float) -> None:
    assert vqa_accuracy(prediction, [answer]) == expected


def test_one_right_answer_is_normalised_too() -> None:
    # LAVIS gives 0 for all of these, since it normalises the prediction alone
    assert [vqa_accuracy(*pair) for pair in (("T-shirt", ["t-shirt"]), ("t shirt", ["t-shirt"]))] == [1.0, 1.0]


def test_score_of_one_right_answer_by_hand() -> None:
    rows = [("the left", "left"), ("right", "left"), ("left", "Left."), ("2", "two")]
    outcomes = [Outcome("gqa", said, Truth(answer, answers=(answer,))) for said, answer in rows]
    # left is right three times of four
    assert score_by_task(outcomes, "vqa") == {"gqa": TaskScore(accuracy=0.75, majority=0.75, n=4)}


def test_ten_answers_or_one_in_all_records() -> None:
    ten, one = Truth("cat", answers=("cat",) * 10), Truth("cat", answers=("cat",))
    METRICS["vqa"].check_set([ten, ten])
    METRICS["vqa"].check_set([one, one])
    with pytest.raises(ValueError, match="answers: 1 of 3 records have one; allowed: 10 in all, or one in all"):
        METRICS["vqa"].check_set([ten, one, ten])


@pytest.mark.parametrize("count", [0, 2, 9, 11])
def test_ten_answers_are_needed_or_one(count: int) -> None:
    with pytest.raises(ValueError, match=f"answers: {count} given; allowed: exactly 10 .*, or exactly one"):
        METRICS["vqa"].check(Truth("cat", answers=("cat",) * count))
    with pytest.raises(ValueError, match=f"answers: {count} given"):
        vqa_accuracy("cat", ["cat"] * count)
