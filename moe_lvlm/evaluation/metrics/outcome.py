"""What a metric reads, what it says of one answer, and what comes out for a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Truth:
    """What an answer is compared with; each metric reads its part.

    answer: the record's own. answers: those of several people (`vqa`). options: texts of the choices A, B, ...
    (`choice`). group: records of one question with its options in other orders (`choice`). category: the part of the
    benchmark (`yes_no`, `mme`). image: the first image, as the record names it (`mme`).
    """

    answer: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    group: str | None = None
    category: str | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question's result. task: the score that it counts for."""

    task: str
    prediction: str
    truth: Truth


@dataclass(frozen=True, slots=True)
class TaskScore:
    """accuracy: mean credit of the answers. majority: what the best constant answer would get, which for questions with
    one right answer is the most frequent one. n: questions. details: further numbers of the metric, by name."""

    accuracy: float
    majority: float
    n: int
    details: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float | int]:
        """As metrics.json holds it."""
        return {"accuracy": self.accuracy, "majority": self.majority, "n": self.n, **self.details}


def _no_details(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return {}


def _no_check(truths: Sequence[Truth]) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One way to score answers.

    credit: (prediction, truth) -> 0 to 1. constants: the credit that answers would get if they were always given; all
    others get none. check: raises ValueError where a record's truth cannot be scored. check_set: the same for all
    records of a set together. details: further numbers of a task. is_soft: credit may lie between 0 and 1.
    """

    credit: Callable[[str, Truth], float]
    constants: Callable[[Truth], Mapping[str, float]]
    check: Callable[[Truth], None]
    check_set: Callable[[Sequence[Truth]], None] = _no_check
    details: Callable[[Sequence[Outcome]], dict[str, float]] = _no_details
    is_soft: bool = False
