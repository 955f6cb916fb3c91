"""Letters read from answers, and accuracy over the rotations of a question."""

from __future__ import annotations

import pytest

from moe_lvlm.evaluation.metrics import METRICS, Outcome, TaskScore, Truth, score_by_task
from moe_lvlm.evaluation.metrics.choice import circular_accuracy, read_choice

OPTIONS = ("a cat", "A dog.", "birds")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # what LLaVA's evaluation of ScienceQA reads
        ("B", "B"),
        (" B\n", "B"),
        ("B. a dog", "B"),
        ("B\nbecause it barks", "B"),
        ("I think so. The answer is C.", "C"),
        ("The answer is C", "C"),
        # what it does not
        ("B.", "B"),
        ("(B)", "B"),
        ("(B) a dog", "B"),
        ("(B).", "B"),
        ("B) a dog", "B"),
        ("B: a dog", "B"),
        ("the answer is (C)", "C"),
        # no letter
        ("A dog sits there", None),
        ("b", None),
        ("G", None),
        ("BC", None),
        ("A.5", None),
        ("The answer is Cats", None),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert read_choice(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("D", None),  # there are three options
        ("The answer is D", None),
        ("A cat.", "A"),
        ("a dog", "B"),
        ("Birds", "C"),
        ("bird", None),
    ],
)
def test_letters_where_the_options_are_known(text: str, letter: str | None) -> None:
    assert read_choice(text, OPTIONS) == letter


def test_an_option_that_stands_twice_is_not_chosen_by_its_text() -> None:
    assert read_choice("cat", ("cat", "dog", "Cat")) is None
    assert read_choice("dog", ("cat", "dog", "Cat")) == "B"


def test_score_by_hand() -> None:
    outcomes = [
        Outcome("sqa", "A. a cat", Truth("A", options=OPTIONS)),
        Outcome("sqa", "a dog", Truth("a cat", options=OPTIONS)),
        Outcome("sqa", "B", Truth("B.")),
        Outcome("sqa", "a dog", Truth("B")),  # without options its text says nothing
    ]
    # right: first and third; A and B are right twice each; only the last chooses nothing
    expected = TaskScore(accuracy=0.5, majority=0.5, n=4, details={"no_letter": 0.25})
    assert score_by_task(outcomes, "choice") == {"sqa": expected}


def test_circular_by_hand() -> None:
    # group x: right in both rotations; y: in one of three; z: asked once, wrong
    rows = [("x", "A", "A"), ("y", "B", "B"), ("x", "B", "B"), ("y", "C", "A"), ("y", "A", "C"), ("z", "A", "B")]
    outcomes = [Outcome("mmb", prediction, Truth(answer, group=group)) for group, prediction, answer in rows]
    assert circular_accuracy(outcomes) == pytest.approx(1 / 3)
    score = score_by_task(outcomes, "choice")["mmb"]
    assert score.accuracy == pytest.approx(3 / 6)
    assert score.details == {"no_letter": 0.0, "circular": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (Truth("a cat"), "'a cat' chooses nothing; allowed: one of the letters A, B, C, D, E, F$"),
        (Truth("D", options=OPTIONS), "letters A, B, C, or the text of one option"),
        (Truth("A", options=("one",)), "options: 1 given; allowed are 2 to 6"),
        (Truth("A", options=tuple("abcdefg")), "options: 7 given"),
    ],
)
def test_records_that_cannot_be_scored(truth: Truth, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METRICS["choice"].check(truth)


def test_groups_are_for_all_records_or_none() -> None:
    METRICS["choice"].check_set([Truth("A"), Truth("B")])
    METRICS["choice"].check_set([Truth("A", group="x"), Truth("B", group="x")])
    with pytest.raises(ValueError, match="group: 1 of 2 records"):
        METRICS["choice"].check_set([Truth("A", group="x"), Truth("B")])
