"""A recipe as keys and values, to compare two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(value: Any, *, whole: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value; a list is a value, and so is what stands at the key `whole`."""
    if not isinstance(value, Mapping) or path == whole:
        yield path, value
        return
    for key, inner in value.items():
        yield from leaves(inner, whole=whole, path=f"{path}.{key}" if path else key)
