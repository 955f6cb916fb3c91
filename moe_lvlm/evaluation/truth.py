"""What a record of an evaluation set says beside its conversation, for the metric that scores it.

The keys are read only by the metrics that need them: published training files use the same names for other things.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.records import Record
from moe_lvlm.evaluation.metrics import METRICS, Truth

_KEYS: dict[str, tuple[str, ...]] = {
    "exact_match": (),
    "choice": ("options", "group"),
    "vqa": ("answers",),
    "yes_no": ("category",),
    "mme": ("category",),
    "cider": ("references",),
}


def read_truth(facts: Mapping[str, Any], record: Record, metric: str) -> Truth:
    """The record's part of the comparison. facts: what its file says beside (`Source.facts`).

    Raises:
        RecordFault: a key of the metric is of another kind, or the metric cannot score by it.
    """
    keys = _KEYS[metric]
    truth = Truth(
        answer=record.turns[-1].text,
        answers=_texts(facts, "answers") if "answers" in keys else (),
        options=_texts(facts, "options") if "options" in keys else (),
        group=_text(facts, "group") if "group" in keys else None,
        category=_text(facts, "category") if "category" in keys else None,
        image=record.images[0] if record.images else None,
        references=_texts(facts, "references") if "references" in keys else (),
    )
    try:
        METRICS[metric].check(truth)
    except ValueError as error:
        raise RecordFault(f"{error} (metric {metric})") from error
    return truth


def _text(facts: Mapping[str, Any], key: str) -> str | None:
    value = facts.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise RecordFault(f"{key} is {value!r}; allowed: a string with at least one character")
    return value


def _texts(facts: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = facts.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RecordFault(f"{key} is {value!r}; allowed: a list of strings")
    return tuple(value)
