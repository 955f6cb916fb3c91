"""What a user asked, as text without images, and the number by which such a text is known."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from moe_lvlm.data.records import IMAGE_MARK, Turn


def human_texts(turns: Sequence[Turn]) -> tuple[str, ...]:
    """The words of each human turn, without image marks and outer space."""
    return tuple(turn.text.replace(IMAGE_MARK, "").strip() for turn in turns if turn.role == "human")


def first_instruction(turns: Sequence[Turn]) -> str:
    """The instruction by which a conversation is clustered: its first human turn."""
    return human_texts(turns[:1])[0]


def instruction_hash(text: str) -> int:
    """XXH3, 64 bits, of the text in UTF-8."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8"))
