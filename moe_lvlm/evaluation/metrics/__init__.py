"""Scores of generated answers by task, beside what a constant answer would reach: one file a metric."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from moe_lvlm.evaluation.metrics.choice import CHOICE
from moe_lvlm.evaluation.metrics.exact import EXACT_MATCH, exact_match, majority_baseline, normalize_answer
from moe_lvlm.evaluation.metrics.mme import MME
from moe_lvlm.evaluation.metrics.outcome import Metric, Outcome, TaskScore, Truth
from moe_lvlm.evaluation.metrics.vqa import VQA
from moe_lvlm.evaluation.metrics.yes_no import YES_NO

METRICS: dict[str, Metric] = {
    "exact_match": EXACT_MATCH,
    "choice": CHOICE,
    "vqa": VQA,
    "yes_no": YES_NO,
    "mme": MME,
}
"""By the name that a recipe gives them (`evaluation.tasks`, `metric`)."""

__all__ = [
    "METRICS",
    "Metric",
    "Outcome",
    "TaskScore",
    "Truth",
    "exact_match",
    "majority_baseline",
    "normalize_answer",
    "score_by_task",
]


def score_by_task(outcomes: Iterable[Outcome], metric: str = "exact_match") -> dict[str, TaskScore]:
    """Each task's score by one metric, tasks in alphabetical order."""
    by_task: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_task[outcome.task].append(outcome)
    return {task: _score(by_task[task], METRICS[metric]) for task in sorted(by_task)}


def _score(outcomes: Sequence[Outcome], metric: Metric) -> TaskScore:
    total = sum(metric.credit(outcome.prediction, outcome.truth) for outcome in outcomes)
    constants: Counter[str] = Counter()
    for outcome in outcomes:
        constants.update(metric.constants(outcome.truth))
    return TaskScore(
        accuracy=total / len(outcomes),
        majority=max(constants.values()) / len(outcomes),
        n=len(outcomes),
        details=metric.details(outcomes),
    )
