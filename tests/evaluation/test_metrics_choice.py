"""Letters and options' texts read from answers, and accuracy over the rotations of a question."""

from __future__ import annotations

import pytest

from moe_lvlm.evaluation.metrics import METRICS, Outcome, TaskScore, Truth, score_by_task, score_set
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
        Outcome("sqa", "a dog", Truth("A", options=OPTIONS)),
        Outcome("sqa", "B", Truth("B.")),
        Outcome("sqa", "a dog", Truth("B")),  # without options its text says nothing
    ]
    # right: first and third; A and B are right twice each; only the last chooses nothing
    expected = TaskScore(accuracy=0.5, majority=0.5, n=4, details={"no_letter": 0.25})
    assert score_by_task(outcomes, "choice") == {"sqa": expected}


# Of these options some are letters too, or read like one with its text; "white" stands twice, as in published sets.
TEXTS = (("d", "b", "a", "c"), ("B", "A", "white", "white"), ("A. Lincoln", "yes", "no", "maybe"))


@pytest.mark.parametrize(
    ("prediction", "answer", "options", "credit"),
    [
        ("A dog", "a dog", OPTIONS, 1),
        ("a dog.", "A dog.", OPTIONS, 1),
        ("dog", "A dog.", OPTIONS, 0),  # a near miss
        ("a dog or birds", "A dog.", OPTIONS, 0),
        ("The answer is a dog", "A dog.", OPTIONS, 0),
        ("B", "A dog.", OPTIONS, 0),  # its prompt names no letters
        ("D", "d", TEXTS[0], 1),  # the text d, not the letter of "c"
        ("C.", "d", TEXTS[0], 0),
        ("A", "A", TEXTS[1], 1),
        ("B", "A", TEXTS[1], 0),
        ("white", "white", TEXTS[1], 1),
        ("a. lincoln", "A. Lincoln", TEXTS[2], 1),
        ("yes", "A. Lincoln", TEXTS[2], 0),
    ],
)
def test_options_chosen_by_their_texts(prediction: str, answer: str, options: tuple[str, ...], credit: float) -> None:
    # another record whose answer is no letter shows how the set is answered
    truths = [Truth(answer, options=options), Truth("birds", options=OPTIONS)]
    for truth in truths:
        METRICS["choice"].check(truth)
    METRICS["choice"].check_set(truths)
    outcomes = [Outcome("aok", said, truth) for said, truth in zip((prediction, "birds"), truths, strict=True)]
    assert score_set(outcomes, "choice").credits == [credit, 1]


def test_score_by_text_by_hand() -> None:
    rows = [("A dog", "a dog"), ("a dog", "birds"), ("C", "birds"), ("a bird", "birds"), ("birds", "birds")]
    outcomes = [Outcome("aok", said, Truth(answer, options=OPTIONS)) for said, answer in rows]
    # right: first and last; "birds" is right four times of five; "C" and "a bird" choose nothing
    expected = TaskScore(accuracy=0.4, majority=0.8, n=5, details={"no_letter": 0.4})
    assert score_by_task(outcomes, "choice") == {"aok": expected}


def test_letters_and_texts_do_not_mix() -> None:
    truths = [Truth("C", options=OPTIONS), Truth("birds", options=OPTIONS)]
    with pytest.raises(ValueError, match=r"the answers of 1 of 2 records are letters \('C'\), .*allowed: one kind"):
        METRICS["choice"].check_set(truths)


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
