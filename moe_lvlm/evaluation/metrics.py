"""Scores of generated answers: exact match by task, beside what always giving one answer would reach."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

_QUOTES = "\"'`"
_CLOSING = ".,;:!?"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question's result. task: the score that it counts for; answer: the record's own answer."""

    task: str
    prediction: str
    answer: str


@dataclass(frozen=True, slots=True)
class TaskScore:
    """accuracy: share of right answers. majority: share that always giving the most frequent answer would get right.
    n: questions."""

    accuracy: float
    majority: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """As metrics.json holds it."""
        return asdict(self)


def normalize_answer(text: str) -> str:
    """The form in which answers are compared.

    Compatibility characters and case are folded, runs of white space become one space, and quotes around the answer
    and punctuation after it go ("  A  Dog. " -> "a dog"). Signs that carry meaning stay: "-5", ".5", "$5", "no. 5".
    An answer of nothing but such marks stays as it is, so that "?" does not equal "".
    """
    # folding can make new compatibility sequences, so both are applied twice (Unicode, toNFKC_Casefold)
    for _ in range(2):
        text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    bare = text.rstrip(_CLOSING + _QUOTES + " ").lstrip(_QUOTES + " ")
    return bare or text


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two answers are equal once normalised."""
    return normalize_answer(prediction) == normalize_answer(answer)


def majority_baseline(answers: Sequence[str]) -> float:
    """Accuracy of always giving the most frequent (normalised) of these answers.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("majority_baseline: no answers were given; at least one is needed")
    [(_, count)] = Counter(normalize_answer(answer) for answer in answers).most_common(1)
    return count / len(answers)


def score_by_task(outcomes: Iterable[Outcome]) -> dict[str, TaskScore]:
    """Exact-match accuracy of each task, tasks in alphabetical order."""
    by_task: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_task[outcome.task].append(outcome)
    return {task: _score(by_task[task]) for task in sorted(by_task)}


def _score(outcomes: Sequence[Outcome]) -> TaskScore:
    correct = sum(exact_match(outcome.prediction, outcome.answer) for outcome in outcomes)
    return TaskScore(
        accuracy=correct / len(outcomes),
        majority=majority_baseline([outcome.answer for outcome in outcomes]),
        n=len(outcomes),
    )
