"""Multiple choice by letter, for ScienceQA and MMBench."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from moe_lvlm.evaluation.metrics.exact import normalize_answer
from moe_lvlm.evaluation.metrics.outcome import Metric, Outcome, Truth

LETTERS = "ABCDEF"

# "C", "C.", "(C)", "C) a dog", "C: a dog"; not "A dog", whose first word is an article
_LEADING = re.compile(rf"\(?([{LETTERS}])(?:\Z|[.):,](?:\s|\Z)|\)[.:,](?:\s|\Z))")
_SENTENCE = re.compile(rf"[Tt]he answer is \(?([{LETTERS}])(?![A-Za-z])")


def read_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter that an answer chooses, or None if there is none to read.

    options: texts of A, B, ...; letters beyond them do not count. Read, in this order: a letter alone or at the start
    with a mark after it, "The answer is C", and (where options are known) the text of exactly one option.

    Source: LLaVA's evaluation of ScienceQA, which knows "C", "C. ..." and "The answer is C". Ours reads "(C)", "C)",
    "C:" and an option's text too, and does not read "The answer is Cats" as C.
    """
    line = text.strip().replace("\n", ". ")
    allowed = LETTERS[: len(options)] if options else LETTERS
    for pattern in (_LEADING.match, _SENTENCE.search):
        found = pattern(line)
        if found is not None and found[1] in allowed:
            return found[1]
    same = [place for place, option in enumerate(options) if normalize_answer(option) == normalize_answer(text)]
    return LETTERS[same[0]] if len(same) == 1 else None


def circular_accuracy(outcomes: Sequence[Outcome]) -> float:
    """The share of groups all of whose questions are right.

    Source: MMBench's CircularEval (Liu et al. 2023): a question is asked once for every rotation of its
    options and counts as right if all of these answers are.
    """
    is_right: defaultdict[str | None, bool] = defaultdict(lambda: True)
    for outcome in outcomes:
        is_right[outcome.truth.group] &= _credit(outcome.prediction, outcome.truth) == 1
    return sum(is_right.values()) / len(is_right)


def _credit(prediction: str, truth: Truth) -> float:
    return float(read_choice(prediction, truth.options) == _right(truth))


def _right(truth: Truth) -> str:
    letter = read_choice(truth.answer, truth.options)
    assert letter is not None, "checked when the set was read"
    return letter


def _details(outcomes: Sequence[Outcome]) -> dict[str, float]:
    unread = sum(read_choice(outcome.prediction, outcome.truth.options) is None for outcome in outcomes)
    found = {"no_letter": unread / len(outcomes)}
    if all(outcome.truth.group is not None for outcome in outcomes):
        found["circular"] = circular_accuracy(outcomes)
    return found


def _check(truth: Truth) -> None:
    if truth.options and not 2 <= len(truth.options) <= len(LETTERS):
        raise ValueError(f"options: {len(truth.options)} given; allowed are 2 to {len(LETTERS)}, for {LETTERS}")
    if read_choice(truth.answer, truth.options) is None:
        allowed = LETTERS[: len(truth.options)] if truth.options else LETTERS
        raise ValueError(
            f"the answer {truth.answer!r} chooses nothing; allowed: one of the letters {', '.join(allowed)}"
            + (", or the text of one option" if truth.options else "")
        )


def _check_set(truths: Sequence[Truth]) -> None:
    grouped = sum(truth.group is not None for truth in truths)
    if grouped not in (0, len(truths)):
        raise ValueError(f"group: {grouped} of {len(truths)} records have it; allowed: all of them, or none")


CHOICE = Metric(
    credit=_credit,
    constants=lambda truth: {_right(truth): 1.0},
    check=_check,
    check_set=_check_set,
    details=_details,
)
