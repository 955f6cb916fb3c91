"""From an object of a published dataset to a record: its image's file, what is asked, what is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any, NamedTuple

from moe_lvlm.config.instructions import asks_for_question, template_fields
from moe_lvlm.data.draws import choose
from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.instructions import first_instruction
from moe_lvlm.data.published.dataset import Dataset, Fields, Item
from moe_lvlm.data.records import IMAGE_MARK, Record, Turn, check_turns, describe, record_id

MOST_OCR_TOKENS = 30
"""Words read in an image that an instruction names; further ones are left out, as LAVIS does."""


class PublishedLayout:
    """Reads the objects of one dataset.

    A record is one question and one answer about one image. A draw chooses the instruction, and the answer where there
    are several; without one they are the first instruction and the answer that is shown as right. An instruction with
    {ANSWER} gives the answer and wants the question.
    """

    def __init__(self, dataset: Dataset, *, image_pattern: str, instructions: tuple[str, ...]) -> None:
        """image_pattern: for `str.format` and an object's fields. instructions: templates, whose fields records fill."""
        self._dataset = dataset
        self._image_pattern = image_pattern
        self._image_fields = template_fields(image_pattern)
        self._instructions = tuple(Instruction(template, asks_for_question(template)) for template in instructions)

    def record_id(self, raw: object) -> str | None:
        return record_id(raw, self._dataset.id_key)

    def record(self, raw: object, draw: int | None) -> Record:
        fields = _fields(raw)
        item = self._dataset.parse(fields)
        if draw is None:
            instruction, answer = self._instructions[0], item.answer
        else:
            instruction = choose(self._instructions, draw, "instruction")
            answer = choose(item.answers, draw, "answer")
        return Record(
            id=self.record_id(raw),
            images=(self._image(fields),),
            turns=instruction.turns(item, answer),
            question=None if instruction.asks_for_question else item.question,
        )

    def instructions(self, raw: object) -> tuple[str, ...]:
        """Each instruction once, and where it gives the answer once for each different one."""
        item = self._dataset.parse(_fields(raw))
        drawn = [
            instruction.turns(item, answer)
            for instruction in self._instructions
            for answer in dict.fromkeys(item.answers if instruction.asks_for_question else item.answers[:1])
        ]
        return tuple(dict.fromkeys(map(first_instruction, drawn)))

    def facts(self, raw: object) -> Mapping[str, Any]:
        item = self._dataset.parse(_fields(raw))
        return {"answers": [item.question]} if self._instructions[0].asks_for_question else item.facts

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


class Instruction(NamedTuple):
    """A template, and whether it gives the answer and wants the question."""

    template: str
    asks_for_question: bool

    def turns(self, item: Item, answer: str) -> tuple[Turn, Turn]:
        """What is asked of an item, and what is answered. Raises RecordFault if its words hold an image mark."""
        words = self.template.format(
            QUESTION=item.question,
            ANSWER=answer,
            CANDIDATES=", ".join(item.options),
            OPTIONS=lettered(item.options),
            OCR_TOKENS=", ".join(item.ocr_tokens[:MOST_OCR_TOKENS]),
            CONTEXT=item.context,
        ).strip()
        reply = item.question if self.asks_for_question else answer
        assert reply is not None, "settings that could be made ask for no question where there is none"
        turns = (Turn("human", f"{IMAGE_MARK}\n{words}"), Turn("gpt", reply))
        if check_turns(turns) != 1:
            raise RecordFault(f"the question holds {IMAGE_MARK}, which stands for an image: {words!r}")
        return turns


def lettered(options: Sequence[str]) -> str:
    """`(a) x (b) y`; more than 26 go on with aa, ab, ..."""
    letters = (*ascii_lowercase, *(one + two for one in ascii_lowercase for two in ascii_lowercase))
    return " ".join(f"({letter}) {option}" for letter, option in zip(letters, options, strict=False))


def _fields(raw: object) -> Fields:
    if not isinstance(raw, dict):
        raise RecordFault(f"the record is {describe(raw)}; it must be an object")
    return raw
