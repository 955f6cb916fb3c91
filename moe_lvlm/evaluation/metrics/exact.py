"""Exact match of normalised answers, for GQA and for sets of one's own."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from moe_lvlm.evaluation.metrics.outcome import Metric, Truth, best_constant, one_by_one

_QUOTES = "\"'`"
_CLOSING = ".,;:!?"


def normalize_answer(text: str) -> str:
    """The form in which answers are compared.

    Compatibility characters and case are folded, runs of white space become one space, and quotes around the answer
    and punctuation after it go ("  A  Dog. " -> "a dog"). Signs that carry meaning stay: "-5", ".5", "$5", "no. 5".
    An answer of nothing but such marks stays as it is, so that "?" does not equal "".

    LLaVA's GQA evaluation lowers the answer and takes periods off its end, and GQA's script asks for equal strings;
    for GQA's answers, which are lower-case words, this form decides the same wherever the answer is words and periods.
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


def _check(truth: Truth) -> None:
    """Any text can be an answer."""


EXACT_MATCH = Metric(
    credits=one_by_one(lambda prediction, truth: float(exact_match(prediction, truth.answer))),
    majority=best_constant(lambda truth: {normalize_answer(truth.answer): 1.0}),
    check=_check,
)
