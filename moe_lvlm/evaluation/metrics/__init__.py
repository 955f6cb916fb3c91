"""Scores of generated answers by task, beside what a constant answer would reach: one file a metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_lvlm.evaluation.metrics.choice import CHOICE
from moe_lvlm.evaluation.metrics.cider import CIDER
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
    "cider": CIDER,
}
"""By the name that a recipe gives them (`evaluation.tasks`, `metric`)."""

__all__ = [
    "METRICS",
    "Metric",
    "Outcome",
    "SetScores",
    "TaskScore",
    "Truth",
    "exact_match",
    "majority_baseline",
    "normalize_answer",
    "score_by_task",
    "score_set",
]


@dataclass(frozen=True, slots=True)
class SetScores:
    """credits: of each outcome, in their order. by_task: each task's score, tasks in alphabetical order."""

    credits: list[float]
    by_task: dict[str, TaskScore]


def score_set(outcomes: Sequence[Outcome], metric: str = "exact_match") -> SetScores:
    """Credits and scores of an evaluation set by one metric."""
    places_by_task: defaultdict[str, list[int]] = defaultdict(list)
    for place, outcome in enumerate(outcomes):
        places_by_task[outcome.task].append(place)
    credits = [0.0] * len(outcomes)
    by_task = {}
    for task, places in sorted(places_by_task.items()):
        members = [outcomes[place] for place in places]
        found = METRICS[metric].credits(members)
        for place, credit in zip(places, found, strict=True):
            credits[place] = credit
        by_task[task] = TaskScore(
            accuracy=sum(found) / len(found),
            majority=METRICS[metric].majority([member.truth for member in members]),
            n=len(found),
            details=METRICS[metric].details(members),
        )
    return SetScores(credits, by_task)


def score_by_task(outcomes: Iterable[Outcome], metric: str = "exact_match") -> dict[str, TaskScore]:
    """Each task's score by one metric, tasks in alphabetical order."""
    return score_set(list(outcomes), metric).by_task
