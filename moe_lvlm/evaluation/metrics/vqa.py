"""VQA accuracy over ten people's answers (VQAv2, OK-VQA, TextVQA, VizWiz), or beside one right answer (GQA)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from moe_lvlm.evaluation.metrics.outcome import Metric, Truth, best_constant, one_by_one

NUM_ANSWERS = 10

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_MARKS = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")

# A word without its apostrophe gets it back ("dont" -> "don't").
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Of these one apostrophe may be missing.
_MORE_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""


def _contractions() -> dict[str, str]:
    found = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _MORE_APOSTROPHES.split():
        places = [place for place, character in enumerate(word) if character == "'"]
        found |= {word[:place] + word[place + 1 :]: word for place in places}
    # in the published table it stands the wrong way round, and scores depend on it
    return found | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


def normalize_vqa_answer(text: str) -> str:
    """The form in which VQA answers are compared.

    Lower case; commas and question marks go, and "'s" becomes a word; a punctuation mark goes where it touches a space
    anywhere in the text, and becomes a space where it does not; periods go, but for decimal points; number words up to
    ten become digits; articles go; contractions get their apostrophes.

    Source: the answer processing of the VQA challenge (visualqa.org, evaluation code) in the form in which TextVQA is
    scored by its authors (MMF, EvalAI's processor) and by LLaVA, apostrophes and colons staying.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    kept = text
    for mark in _MARKS:
        touches_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if touches_space else " ")
    words = (_DIGITS.get(word, word) for word in _PERIOD.sub("", kept).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of an answer beside those of ten people: 0, .3, .6, .9 or 1. Beside a single answer: whether the two are
    equal in normal form, 0 or 1.

    min(1, m / 3), where m people of nine gave the same answer, averaged over the ten ways to leave one out (VQA: Antol
    et al. 2015, as the challenge computes it). Three of ten thus give (3 x 2/3 + 7 x 1) / 10 = .9. The rule for one is
    LAVIS's for GQA (BLIP-2, InstructBLIP), which however normalises the prediction alone, so that no answer meets
    "t-shirt".

    Raises:
        ValueError: there are neither ten answers nor one.
    """
    _check_count(answers)
    return _credits(answers).get(normalize_vqa_answer(prediction), 0.0)


def _credits(answers: Sequence[str]) -> dict[str, float]:
    """What each of the (normalised) answers would get."""
    if len(answers) == 1:
        return {normalize_vqa_answer(answers[0]): 1.0}
    total = len(answers)
    counts = Counter(map(normalize_vqa_answer, answers))
    return {
        answer: (count * min(count - 1, 3) + (total - count) * min(count, 3)) / (3 * total)
        for answer, count in counts.items()
    }


def _check_count(answers: Sequence[str]) -> None:
    if len(answers) not in (1, NUM_ANSWERS):
        raise ValueError(
            f"answers: {len(answers)} given; allowed: exactly {NUM_ANSWERS} strings, one a person, or exactly one, the "
            "only right answer"
        )


def _check(truth: Truth) -> None:
    _check_count(truth.answers)


def _check_set(truths: Sequence[Truth]) -> None:
    single = sum(len(truth.answers) == 1 for truth in truths)
    if single not in (0, len(truths)):
        raise ValueError(
            f"answers: {single} of {len(truths)} records have one; allowed: {NUM_ANSWERS} in all, or one in all"
        )


VQA = Metric(
    credits=one_by_one(lambda prediction, truth: vqa_accuracy(prediction, truth.answers)),
    majority=best_constant(lambda truth: _credits(truth.answers)),
    check=_check,
    check_set=_check_set,
    is_soft=True,
)
