"""Scores worked out by hand, and what must hold for any text."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lvlm.config.recipe import TaskSettings
from moe_lvlm.evaluation.metrics import (
    METRICS,
    Outcome,
    TaskScore,
    Truth,
    exact_match,
    majority_baseline,
    normalize_answer,
    score_by_task,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A  Dog. ", "a dog"),
        ("top\tleft\n", "top left"),
        ("'Yes!'", "yes"),
        ('"red".', "red"),
        ("ＴＷＯ", "two"),  # full-width letters
        ("Straße", "strasse"),
        ("-5", "-5"),
        (".5", ".5"),
        ("$5", "$5"),
        ("no. 5", "no. 5"),
        ("?", "?"),
        ("", ""),
        (" ", ""),
    ],
)
def test_normal_form(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "equal"),
    [
        ("Cat.", "cat", True),
        ("a cat", "cat", False),
        ("cats", "cat", False),
        ("5", "-5", False),
        ("", "cat", False),
        ("", "?", False),
        ("3", "3 ", True),
    ],
)
def test_exact_match(prediction: str, answer: str, equal: bool) -> None:
    assert exact_match(prediction, answer) is equal


@given(st.text())
def test_normal_form_is_stable_and_ignores_case_and_outer_space(text: str) -> None:
    normal = normalize_answer(text)
    assert normalize_answer(normal) == normal
    assert exact_match(f" \n{text}\t", text)
    assert exact_match(text.casefold(), text)


def test_majority_by_hand() -> None:
    # cat 3 of 5, in three spellings
    assert majority_baseline(["cat", "Cat.", " cat", "dog", "bird"]) == pytest.approx(0.6)


def test_majority_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answers"):
        majority_baseline([])


def test_scores_by_hand() -> None:
    outcomes = [
        Outcome("what", "cat", Truth("Cat")),
        Outcome("count", "2", Truth("3")),
        Outcome("what", "dog", Truth("cat")),
        Outcome("what", "dog.", Truth("dog")),
        Outcome("count", "3", Truth("3")),
        Outcome("what", "", Truth("bird")),
    ]
    assert score_by_task(outcomes) == {
        "count": TaskScore(accuracy=0.5, majority=1.0, n=2),
        "what": TaskScore(accuracy=0.5, majority=0.5, n=4),
    }
    assert list(score_by_task(outcomes)) == ["count", "what"]
    assert score_by_task(outcomes)["count"].to_dict() == {"accuracy": 0.5, "majority": 1.0, "n": 2}


def test_no_outcomes_no_scores() -> None:
    assert all(score_by_task([], metric) == {} for metric in METRICS)


def test_every_metric_that_a_recipe_may_name_is_there() -> None:
    assert set(METRICS) == set(get_args(TaskSettings.model_fields["metric"].annotation))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from("xyz")), min_size=1))
def test_always_giving_the_most_frequent_answer_scores_the_majority(rows: list[tuple[str, str, str]]) -> None:
    for task in {task for task, _, _ in rows}:
        answers = [answer for row_task, _, answer in rows if row_task == task]
        favourite = Counter(answers).most_common(1)[0][0]
        score = score_by_task([Outcome(task, favourite, Truth(answer)) for answer in answers])[task]
        assert score.accuracy == score.majority
        assert score.n == len(answers)
