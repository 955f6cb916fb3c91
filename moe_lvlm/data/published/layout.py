"""From an object of a published dataset to a record: its image's file, what is asked, what is answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_lvlm.config.instructions import template_fields
from moe_lvlm.data.draws import choose
from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.published.dataset import Dataset, Fields
from moe_lvlm.data.records import IMAGE_MARK, Record, Turn, check_turns, describe, record_id


class PublishedLayout:
    """Reads the objects of one dataset.

    A record is one question and one answer about one image. A draw chooses the instruction, and the answer where there
    are several; without one they are the first instruction and the answer that is shown as right.
    """

    def __init__(self, dataset: Dataset, *, image_pattern: str, instructions: tuple[str, ...]) -> None:
        """image_pattern: for `str.format` and an object's fields. instructions: templates with {QUESTION}, {CANDIDATES}."""
        self._dataset = dataset
        self._image_pattern = image_pattern
        self._image_fields = template_fields(image_pattern)
        self._instructions = instructions

    def record_id(self, raw: object) -> str | None:
        return record_id(raw, self._dataset.id_key)

    def record(self, raw: object, draw: int | None) -> Record:
        fields = _fields(raw)
        item = self._dataset.parse(fields)
        if draw is None:
            template, answer = self._instructions[0], item.answer
        else:
            template = choose(self._instructions, draw, "instruction")
            answer = choose(item.answers, draw, "answer")
        words = template.format(QUESTION=item.question, CANDIDATES=", ".join(item.options)).strip()
        turns = (Turn("human", f"{IMAGE_MARK}\n{words}"), Turn("gpt", answer))
        if check_turns(turns) != 1:
            raise RecordFault(f"the question holds {IMAGE_MARK}, which stands for an image: {words!r}")
        return Record(id=self.record_id(raw), images=(self._image(fields),), turns=turns, question=item.question)

    def facts(self, raw: object) -> Mapping[str, Any]:
        return self._dataset.parse(_fields(raw)).facts

    def _image(self, fields: Fields) -> str:
        for key, spec in self._image_fields:
            if key not in fields:
                raise RecordFault(
                    f"image_pattern {self._image_pattern!r} asks for {key}; the record has {', '.join(sorted(fields))}"
                )
            value = fields[key]
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise RecordFault(f"{key} is {describe(value)}; an image's file is named by strings and numbers")
            try:
                format(value, spec)
            except ValueError as error:
                raise RecordFault(
                    f"image_pattern {self._image_pattern!r}: {key} is {describe(value)}, which {spec!r} cannot write ({error})"
                ) from error
        return self._image_pattern.format(**fields)


def _fields(raw: object) -> Fields:
    if not isinstance(raw, dict):
        raise RecordFault(f"the record is {describe(raw)}; it must be an object")
    return raw
