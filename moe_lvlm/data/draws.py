"""What is random about a draw: a number of its own, and choices made by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import xxhash

T = TypeVar("T")


def draw_number(seed: int, epoch: int, position: int) -> int:
    """A number of 63 bits for a place in the stream of epochs: of XXH3, the same on every machine and process."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{epoch}/{position}".encode()) >> 1


def choose(items: Sequence[T], draw: int, what: str) -> T:
    """One of the items, each as likely. what: names the choice, so that a draw's choices do not hang together."""
    return items[xxhash.xxh3_64_intdigest(f"{draw}/{what}".encode()) % len(items)]
