"""JSON lines that others are writing: what can be read of them, and values of the kind that is asked for, or None."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LATEST_MOMENT = 1e11  # the year 5138; times beyond it cannot be shown


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that have their end, one at a time. A file that is not there has none.

    A last line without its end is being written, or was cut off by a crash.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None if it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of events that say which event they are, and the number of lines that could not be read."""
    events = []
    unreadable = 0
    for line in whole_lines(path):
        record = parse_record(line)
        if record is not None and isinstance(record.get("event"), str):
            events.append(record)
        elif line.strip():
            unreadable += 1
    return events, unreadable


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is not there or holds none."""
    try:
        return parse_record(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        return None
    return float(value)


def whole(value: Any) -> int | None:
    """A whole number from 0, else None."""
    found = number(value)
    return int(value) if found is not None and found >= 0 and found == int(found) else None


def moment(value: Any) -> float | None:
    """Unix seconds, else None."""
    found = number(value)
    return found if found is not None and 0 <= found < _LATEST_MOMENT else None


def text(value: Any) -> str:
    """A text, or a number as text, that can be printed on one line; else the empty text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    clean = "".join(mark if mark.isprintable() else " " for mark in str(value))
    return " ".join(clean.encode("utf-8", "replace").decode("utf-8").split())
