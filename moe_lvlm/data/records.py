"""A LLaVA record, checked and typed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, get_args

from moe_lvlm.data.errors import RecordFault

IMAGE_MARK = "<image>"
"""What stands for an image in the text of a record, whatever the tokenizer calls it."""

Role = Literal["human", "gpt"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. Its text may hold image marks if it is a human's."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A conversation about zero or more images.

    id: the record's own, as text. images, mask: paths as they stand in the file. turns: human, gpt, human, gpt, ...
    task: what the record is counted as in an evaluation. mask: foreground of the image, read by analyses only.
    question: the bare question, where the human turn holds it inside an instruction: what a connector reads. None takes
    the first human turn's words.
    """

    id: str | None
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    task: str | None = None
    mask: str | None = None
    question: str | None = None


def record_id(raw: object, key: str = "id") -> str | None:
    """The id of a record that may be anything; None if it has none that can be printed."""
    value = raw.get(key) if isinstance(raw, dict) else None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def parse_record(raw: object) -> Record:
    """Turns one object of a LLaVA file into a `Record`.

    Unknown keys are left alone: published files carry many. Raises RecordFault with the key, the value and what is
    allowed.
    """
    if not isinstance(raw, dict):
        raise RecordFault(f"the record is {describe(raw)}; it must be an object with `conversations`")
    images = _images(raw)
    turns = _turns(raw)
    num_marks = check_turns(turns)
    if turns[-1].role != "gpt":
        raise RecordFault("conversations: the last turn is a human's; it must be an answer (gpt)")
    if num_marks != len(images):
        raise RecordFault(
            f"conversations hold {num_marks} {IMAGE_MARK} mark(s) but `image` names {len(images)}; each image needs one"
        )
    return Record(
        id=record_id(raw),
        images=images,
        turns=turns,
        task=_optional_text(raw, "task"),
        mask=_optional_text(raw, "mask"),
    )


def check_turns(turns: tuple[Turn, ...]) -> int:
    """Raises RecordFault unless turns go human, gpt, human, ... with an answer in every gpt turn; returns the number
    of image marks."""
    if not turns:
        raise RecordFault("conversations is empty; it must start with a human turn")
    for position, turn in enumerate(turns):
        expected = ROLES[position % 2]
        if turn.role != expected:
            raise RecordFault(
                f"conversations[{position}].from is {turn.role!r}; turns alternate human, gpt and start with human,"
                f" so {expected!r} belongs here"
            )
        if turn.role == "gpt" and not turn.text.strip():
            raise RecordFault(f"conversations[{position}].value is an empty answer; an answer needs text")
        if turn.role == "gpt" and IMAGE_MARK in turn.text:
            raise RecordFault(f"conversations[{position}].value: {IMAGE_MARK} stands in an answer, not a human turn")
    return sum(turn.text.count(IMAGE_MARK) for turn in turns)


def _turns(raw: dict[str, object]) -> tuple[Turn, ...]:
    if "conversations" not in raw:
        raise RecordFault(f"`conversations` is missing; the keys are {_shown(sorted(map(str, raw)))}")
    conversations = raw["conversations"]
    if not isinstance(conversations, list):
        raise RecordFault(f"conversations is {describe(conversations)}; it must be a list of turns")
    return tuple(_turn(position, turn) for position, turn in enumerate(conversations))


def _turn(position: int, raw: object) -> Turn:
    where = f"conversations[{position}]"
    if not isinstance(raw, dict):
        raise RecordFault(f"{where} is {describe(raw)}; it must be an object with `from` and `value`")
    role = raw.get("from")
    if role not in ROLES:
        raise RecordFault(f"{where}.from is {_shown(role)}; allowed are human and gpt")
    return Turn(role, check_text(raw.get("value"), f"{where}.value"))


def _images(raw: dict[str, object]) -> tuple[str, ...]:
    value = raw.get("image")
    if value is None:
        return ()
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if not check_text(path, "image"):
            raise RecordFault("image is an empty path; leave the key out for a record without images")
    return tuple(paths)


def _optional_text(raw: dict[str, object], key: str) -> str | None:
    value = raw.get(key)
    return None if value is None else check_text(value, key)


def check_text(value: object, where: str) -> str:
    """The value, which must be a string of Unicode text. where: its key. Raises RecordFault."""
    if not isinstance(value, str):
        raise RecordFault(f"{where} is {describe(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can write half of a surrogate pair; tokenizers and file systems cannot take it
        raise RecordFault(
            f"{where} holds a lone surrogate at character {error.start}; it must be Unicode text"
        ) from error
    return value


def describe(value: object) -> str:
    """A JSON value in words, with the value itself, cut short."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else f"{names.get(type(value), type(value).__name__)}: {_shown(value)}"


def _shown(value: object, limit: int = 60) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= limit else text[: limit - 3] + "..."
