"""Yes or no: accuracy, precision, recall, F1 and the share of yes, for POPE."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from moe_lvlm.evaluation.metrics.exact import normalize_answer
from moe_lvlm.evaluation.metrics.outcome import Metric, Outcome, Truth, best_constant, one_by_one

YesNo = Literal["yes", "no"]

_NO_WORDS = frozenset(("No", "not", "no"))


def read_yes_no(text: str) -> YesNo:
    """What a free answer counts as: no if its first sentence holds the word No, not or no, else yes.

    Source: LLaVA's evaluation of POPE, word for word: commas go, words are what stands between spaces, and case
    counts, so that "NO" and "no!" are yes.
    """
    sentence = text.partition(".")[0].replace(",", "")
    return "no" if _NO_WORDS & set(sentence.split(" ")) else "yes"


def read_label(answer: str) -> YesNo:
    """A record's own answer.

    Raises:
        ValueError: it is neither yes nor no.
    """
    match normalize_answer(answer):
        case "yes":
            return "yes"
        case "no":
            return "no"
        case _:
            raise ValueError(f"the answer is {answer!r}; allowed: yes and no")


def binary_scores(predictions: Sequence[YesNo], labels: Sequence[YesNo]) -> dict[str, float]:
    """Precision, recall and F1 of yes, and the share of predictions that are yes (POPE: Li et al. 2023).

    A ratio whose denominator is 0 is 0, where the published script ends with an error.
    """
    pairs = list(zip(predictions, labels, strict=True))
    hits = pairs.count(("yes", "yes"))
    precision = _ratio(hits, predictions.count("yes"))
    recall = _ratio(hits, labels.count("yes"))
    return {
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(predictions.count("yes"), len(predictions)),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _credit(prediction: str, truth: Truth) -> float:
    return float(read_yes_no(prediction) == read_label(truth.answer))


def _scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return binary_scores(
        [read_yes_no(outcome.prediction) for outcome in outcomes],
        [read_label(outcome.truth.answer) for outcome in outcomes],
    )


def _details(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Over all questions and, where records name their split in `category`, of each split and the mean of their F1."""
    by_category: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.truth.category is not None:
            by_category[outcome.truth.category].append(outcome)
    found = _scores(outcomes)
    by_split = {category: _scores(by_category[category]) for category in sorted(by_category)}
    if by_split:
        found["mean_f1"] = sum(scores["f1"] for scores in by_split.values()) / len(by_split)
    for category, scores in by_split.items():
        right = sum(_credit(outcome.prediction, outcome.truth) for outcome in by_category[category])
        found[f"{category}/accuracy"] = right / len(by_category[category])
        found |= {f"{category}/{name}": value for name, value in scores.items()}
    return found


def _check(truth: Truth) -> None:
    read_label(truth.answer)


def _check_set(truths: Sequence[Truth]) -> None:
    named = sum(truth.category is not None for truth in truths)
    if named not in (0, len(truths)):
        raise ValueError(f"category: {named} of {len(truths)} records have it; allowed: all of them, or none")


YES_NO = Metric(
    credits=one_by_one(_credit),
    majority=best_constant(lambda truth: {read_label(truth.answer): 1.0}),
    check=_check,
    check_set=_check_set,
    details=_details,
)
