"""What a metric reads, what it says of one answer, and what comes out for a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Truth:
    """What an answer is compared with; each metric reads its part.

    answer: the record's own. answers: those of several people (`vqa`). options: texts of the choices A, B, ...
    (`choice`). group: records of one question with its options in other orders (`choice`). category: the part of the
    benchmark (`yes_no`, `mme`). image: the first image, as the record names it (`mme`). references: captions of the
    same image by several people (`cider`).
    """

    answer: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    group: str | None = None
    category: str | None = None
    image: str | None = None
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question's result. task: the score that it counts for."""

    task: str
    prediction: str
    truth: Truth


@dataclass(frozen=True, slots=True)
class TaskScore:
    """accuracy: mean credit of the answers, above 1 possible for `cider` alone (1.39 is printed as 139). majority: what
    the best constant answer would get, which for questions with one right answer is the most frequent one. n: how many
    questions. details: further numbers of the metric, by name."""

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
    """One way to score answers. All of a task's outcomes are scored together, since what one is worth may depend on the
    others (`cider`); `one_by_one` and `best_constant` make these functions where it does not.

    credits: each outcome's credit, in their order. majority: the mean credit of the best constant answer. check: raises
    ValueError where a record's truth cannot be scored. check_set: the same for all records of a task together. details:
    further numbers of a task. is_soft: credit is more than 0 or 1. right_from: the credit from which an answer is
    right; None where no answer is right or wrong.
    """

    credits: Callable[[Sequence[Outcome]], list[float]]
    majority: Callable[[Sequence[Truth]], float]
    check: Callable[[Truth], None]
    check_set: Callable[[Sequence[Truth]], None] = _no_check
    details: Callable[[Sequence[Outcome]], dict[str, float]] = _no_details
    is_soft: bool = False
    right_from: float | None = 0.5

    def verdict(self, credit: float) -> dict[str, float | bool | None]:
        """What predictions.jsonl says of an answer: `correct`, and `credit` where that alone does not tell it."""
        correct = None if self.right_from is None else credit >= self.right_from
        return {"correct": correct, "credit": credit} if self.is_soft else {"correct": correct}


def one_by_one(credit: Callable[[str, Truth], float]) -> Callable[[Sequence[Outcome]], list[float]]:
    """`Metric.credits` from the credit of one answer: (prediction, truth) -> 0 to 1."""
    return lambda outcomes: [credit(outcome.prediction, outcome.truth) for outcome in outcomes]


def best_constant(constants: Callable[[Truth], Mapping[str, float]]) -> Callable[[Sequence[Truth]], float]:
    """`Metric.majority` from the credit that answers would get if they were always given; all others get none."""

    def majority(truths: Sequence[Truth]) -> float:
        total: Counter[str] = Counter()
        for truth in truths:
            total.update(constants(truth))
        return max(total.values()) / len(truths)

    return majority
