"""How the raw objects of a file become records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.instructions import first_instruction
from moe_lvlm.data.records import IMAGE_MARK, Record, parse_record, record_id


class Layout(Protocol):
    """Reads the objects of one kind of file."""

    def record_id(self, raw: object) -> str | None:
        """The id of a record that may be anything; None if it has none that can be printed."""
        ...

    def record(self, raw: object, draw: int | None) -> Record:
        """The record, checked. draw: chooses what is drawn anew each time; None is as an evaluation shows it. Raises
        RecordFault."""
        ...

    def instructions(self, raw: object) -> tuple[str, ...]:
        """All instructions that draws of the record can give, without image marks: what clusters are made of. Raises
        RecordFault."""
        ...

    def facts(self, raw: object) -> Mapping[str, Any]:
        """What metrics compare answers with, by the keys that LLaVA records have for it (docs/evaluation.md). Of an
        object that is a record; raises RecordFault."""
        ...


class LlavaLayout:
    """LLaVA's: the object is the record, and holds what metrics ask for beside its conversation.

    first_turn_only: a longer conversation is its first question and answer.
    """

    def __init__(self, *, first_turn_only: bool = False) -> None:
        self._first_turn_only = first_turn_only

    def record_id(self, raw: object) -> str | None:
        return record_id(raw)

    def record(self, raw: object, draw: int | None) -> Record:
        record = parse_record(raw)
        if not self._first_turn_only or len(record.turns) == 2:
            return record
        turns = record.turns[:2]
        if turns[0].text.count(IMAGE_MARK) != len(record.images):
            raise RecordFault(
                f"conversations: {IMAGE_MARK} stands in a later turn, but turns: first takes the first question alone"
            )
        return replace(record, turns=turns)

    def instructions(self, raw: object) -> tuple[str, ...]:
        return (first_instruction(self.record(raw, None).turns),)

    def facts(self, raw: object) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], raw)


LLAVA = LlavaLayout()
LLAVA_FIRST_TURN = LlavaLayout(first_turn_only=True)
