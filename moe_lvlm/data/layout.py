"""How the raw objects of a file become records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from moe_lvlm.data.records import Record, parse_record, record_id


class Layout(Protocol):
    """Reads the objects of one kind of file."""

    def record_id(self, raw: object) -> str | None:
        """The id of a record that may be anything; None if it has none that can be printed."""
        ...

    def record(self, raw: object, draw: int | None) -> Record:
        """The record, checked. draw: chooses what is drawn anew each time; None is as an evaluation shows it. Raises
        RecordFault."""
        ...

    def facts(self, raw: object) -> Mapping[str, Any]:
        """What metrics compare answers with, by the keys that LLaVA records have for it (docs/evaluation.md). Of an
        object that is a record; raises RecordFault."""
        ...


class LlavaLayout:
    """LLaVA's: the object is the record, and holds what metrics ask for beside its conversation."""

    def record_id(self, raw: object) -> str | None:
        return record_id(raw)

    def record(self, raw: object, draw: int | None) -> Record:
        return parse_record(raw)

    def facts(self, raw: object) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], raw)


LLAVA = LlavaLayout()
