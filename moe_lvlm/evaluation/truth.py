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
}


def read_truth(raw: Mapping[str, Any], record: Record, metric: str) -> Truth:
    """The record's part of the comparison. raw: the object that `record` was parsed from.

    Raises:
        RecordFault: a key of the metric is of another kind, or the metric cannot score by it.
    """
    keys = _KEYS[metric]
    truth = Truth(
        answer=record.turns[-1].text,
        answers=_texts(raw, "answers") if "answers" in keys else (),
        options=_texts(raw, "options") if "options" in keys else (),
        group=_text(raw, "group") if "group" in keys else None,
        category=_text(raw, "category") if "category" in keys else None,
        image=record.images[0] if record.images else None,
    )
    try:
        METRICS[metric].check(truth)
    except ValueError as error:
        raise RecordFault(f"{error} (metric {metric})") from error
    return truth


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not (isinstance(value, str) and value):
        raise RecordFault(f"{key} is {value!r}; allowed: a string with at least one character")
    return value


def _texts(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RecordFault(f"{key} is {value!r}; allowed: a list of strings")
    return tuple(value)
