"""Multiple choice: by letter for ScienceQA and MMBench, by the option's text for A-OKVQA."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from moe_lvlm.evaluation.metrics.exact import normalize_answer
from moe_lvlm.evaluation.metrics.outcome import Metric, Outcome, Truth, best_constant

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
    letter = _letter(text, options)
    if letter is not None:
        return letter
    same = [place for place, option in enumerate(options) if normalize_answer(option) == normalize_answer(text)]
    return LETTERS[same[0]] if len(same) == 1 else None


def is_by_text(truths: Sequence[Truth]) -> bool:
    """Whether a task's options are chosen by their texts: it shows in the records' own answers, of which then not all
    are letters. Its prompts list no letters, so that a letter chooses nothing."""
    return any(_letter(truth.answer, truth.options) is None for truth in truths)


def circular_accuracy(outcomes: Sequence[Outcome]) -> float:
    """The share of groups all of whose questions are right.

    Source: MMBench's CircularEval (Liu et al. 2023): a question is asked once for every rotation of its
    options and counts as right if all of these answers are.
    """
    is_right: defaultdict[str | None, bool] = defaultdict(lambda: True)
    for outcome, credit in zip(outcomes, _credits(outcomes), strict=True):
        is_right[outcome.truth.group] &= credit == 1
    return sum(is_right.values()) / len(is_right)


def _letter(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses without the help of the options' texts."""
    line = text.strip().replace("\n", ". ")
    allowed = LETTERS[: len(options)] if options else LETTERS
    for pattern in (_LEADING.match, _SENTENCE.search):
        found = pattern(line)
        if found is not None and found[1] in allowed:
            return found[1]
    return None


def _chosen(text: str, truth: Truth, by_text: bool) -> str | None:
    """The letter or, by text, the normalised text of the option that an answer chooses; None if it chooses nothing."""
    if not by_text:
        return read_choice(text, truth.options)
    normal = normalize_answer(text)
    return normal if normal in map(normalize_answer, truth.options) else None


def _right(truth: Truth, by_text: bool) -> str:
    right = _chosen(truth.answer, truth, by_text)
    assert right is not None, "checked when the set was read"
    return right


def _all_chosen(outcomes: Sequence[Outcome]) -> tuple[list[str | None], list[str]]:
    """What the predictions choose, and what is right."""
    by_text = is_by_text([outcome.truth for outcome in outcomes])
    return (
        [_chosen(outcome.prediction, outcome.truth, by_text) for outcome in outcomes],
        [_right(outcome.truth, by_text) for outcome in outcomes],
    )


def _credits(outcomes: Sequence[Outcome]) -> list[float]:
    chosen, right = _all_chosen(outcomes)
    return [float(ours == theirs) for ours, theirs in zip(chosen, right, strict=True)]


def _majority(truths: Sequence[Truth]) -> float:
    by_text = is_by_text(truths)
    return best_constant(lambda truth: {_right(truth, by_text): 1.0})(truths)


def _details(outcomes: Sequence[Outcome]) -> dict[str, float]:
    chosen, _ = _all_chosen(outcomes)
    found = {"no_letter": chosen.count(None) / len(outcomes)}
    if all(outcome.truth.group is not None for outcome in outcomes):
        found["circular"] = circular_accuracy(outcomes)
    return found


def _check(truth: Truth) -> None:
    if truth.options and not 2 <= len(truth.options) <= len(LETTERS):
        raise ValueError(f"options: {len(truth.options)} given; allowed are 2 to {len(LETTERS)}, for {LETTERS}")
    if _letter(truth.answer, truth.options) is None and _chosen(truth.answer, truth, by_text=True) is None:
        allowed = LETTERS[: len(truth.options)] if truth.options else LETTERS
        raise ValueError(
            f"the answer {truth.answer!r} chooses nothing; allowed: one of the letters {', '.join(allowed)}"
            + (", or the text of one option" if truth.options else "")
        )


def _check_set(truths: Sequence[Truth]) -> None:
    grouped = sum(truth.group is not None for truth in truths)
    if grouped not in (0, len(truths)):
        raise ValueError(f"group: {grouped} of {len(truths)} records have it; allowed: all of them, or none")
    if is_by_text(truths):
        letters = [truth.answer for truth in truths if _chosen(truth.answer, truth, by_text=True) is None]
        if letters:
            raise ValueError(
                f"the answers of {len(letters)} of {len(truths)} records are letters ({letters[0]!r}), those of the "
                "others options' texts; allowed: one kind in all"
            )


CHOICE = Metric(
    credits=_credits,
    majority=_majority,
    check=_check,
    check_set=_check_set,
    details=_details,
)
