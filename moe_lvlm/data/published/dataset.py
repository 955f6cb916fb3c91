"""What a published dataset is to this package: a way to read its files, and a way to understand one of its objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_lvlm.data.errors import DataFileError, RecordFault
from moe_lvlm.data.json_files import check_suffix, read_json
from moe_lvlm.data.records import check_text, describe

Fields = Mapping[str, Any]
"""An object of a file."""


class Files(NamedTuple):
    """annotations: where answers are kept apart from the questions in `path`. ocr_tokens: the words read in the images.
    by_image: one caption record an image."""

    path: Path
    annotations: Path | None
    by_image: bool
    ocr_tokens: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One object understood.

    question: None if the image is to be captioned. options: what there is to choose from.
    answers: right ones, at least one; training draws among them, each as likely. answer: the one that is shown as right.
    facts: what metrics ask for, by the keys that LLaVA records have for it. ocr_tokens: words that were read in the image.
    context: a text beside it.
    """

    question: str | None
    answers: tuple[str, ...]
    answer: str
    options: tuple[str, ...] = ()
    facts: Fields = field(default_factory=dict)
    ocr_tokens: tuple[str, ...] = ()
    context: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """read: the objects of the files, which may be anything that JSON holds; raises DataFileError. parse: an object
    understood; raises RecordFault. id_key: the key of an object's id. image_pattern: the file of its image, by its
    fields."""

    read: Callable[[Files], Iterable[object]]
    parse: Callable[[Fields], Item]
    id_key: str
    image_pattern: str


def read_list(
    path: Path, key: str | None = None, *, drop: frozenset[str] = frozenset()
) -> tuple[list[Any], Mapping[str, Any]]:
    """The list under a key of the file's object, and the object; without a key the list that the file is, and nothing.

    drop: keys left out of objects at any depth. Raises DataFileError, naming what the file holds.
    """
    wanted = "a list" if key is None else f"an object with the list {key}"
    check_suffix(path, (".json",))
    content = read_json(path, drop=drop, allowed=wanted)
    if key is None and isinstance(content, list):
        return content, {}
    if key is not None and isinstance(content, dict) and isinstance(content.get(key), list):
        return content[key], content
    raise DataFileError(f"{path}: holds {held(content)}; allowed is {wanted}")


def read_by_id(
    path: Path, what: str, id_key: str, *, drop: frozenset[str] = frozenset()
) -> Iterator[tuple[str, object]]:
    """The objects of a file that is an object of them by id, each with its id, which it gets as a field.

    what: the objects, in words. Raises DataFileError.
    """
    wanted = f"an object of {what} by id"
    check_suffix(path, (".json",))
    content = read_json(path, drop=drop, allowed=wanted)
    if not isinstance(content, dict):
        raise DataFileError(f"{path}: holds {held(content)}; allowed is {wanted}")
    for key, value in content.items():
        yield key, {id_key: key, **value} if isinstance(value, dict) else value


def held(content: object) -> str:
    """What a file holds, in words: of an object the keys."""
    return f"an object with {', '.join(sorted(content))}" if isinstance(content, dict) else describe(content)


def text_of(fields: Fields, key: str) -> str:
    """The text under a key, without outer space. Raises RecordFault if there is none."""
    return _words(_value(fields, key), key)


def texts_of(fields: Fields, key: str) -> tuple[str, ...]:
    """The texts in the list under a key, without outer space. Raises RecordFault if there is none, or one is empty."""
    return tuple(_words(one, f"{key}[{place}]") for place, one in enumerate(list_of(fields, key)))


def list_of(fields: Fields, key: str) -> list[Any]:
    """The list under a key. Raises RecordFault if there is none, or it is empty."""
    value = _value(fields, key)
    if not isinstance(value, list) or not value:
        raise RecordFault(f"{key} is {describe(value)}; it must be a list with at least one element")
    return value


def int_of(fields: Fields, key: str, allowed: range) -> int:
    """The whole number under a key. Raises RecordFault if there is none, or it is not in `allowed`."""
    value = _value(fields, key)
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        raise RecordFault(f"{key} is {describe(value)}; allowed: {allowed.start} to {allowed.stop - 1}")
    return value


def _words(value: object, where: str) -> str:
    words = check_text(value, where).strip()
    if not words:
        raise RecordFault(f"{where} is empty; it must hold text")
    return words


def _value(fields: Fields, key: str) -> object:
    if key not in fields:
        raise RecordFault(f"`{key}` is missing; the keys are {', '.join(sorted(fields))}")
    return fields[key]
