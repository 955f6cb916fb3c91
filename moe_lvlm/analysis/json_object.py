"""Reading JSON files of our own: an object of known keys and format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_object(path: Path, *, what: str, version: int, keys: Sequence[str]) -> dict[str, Any]:
    """The file's keys, all there and none else. what: the content, for errors.

    Raises:
        ValueError: they are not.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != version:
        raise ValueError(f"{path}: {what} of format {found}; allowed: {version}")
    if set(content) != set(keys):
        raise ValueError(f"{path}: keys {', '.join(content)}; allowed: exactly {', '.join(keys)}")
    return content


def whole_numbers(values: Any, *, at_least: int, where: str) -> list[int]:
    """A list of whole numbers, none below `at_least`.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(values, list) or not all(type(value) is int and value >= at_least for value in values):
        raise ValueError(f"{where}: {values!r}; allowed: whole numbers from {at_least}")
    return values
