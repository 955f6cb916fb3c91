"""JSON on disk: whole files, files of one object a line, and records kept as text."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_lvlm.data.errors import DataFileError

_SHOWN = 5  # values of a field in an error


class RecordFile:
    """The records of one file, each still as JSON text, decoded when it is asked for.

    One block of bytes in place of millions of Python objects: small, and shared with worker processes (objects are
    copied as soon as their reference counts change).
    """

    def __init__(self, path: Path, lines: Iterable[bytes]) -> None:
        """Raises DataFileError if there is no record."""
        self.path = path
        block, ends = bytearray(), []
        for line in lines:
            block += line
            ends.append(len(block))
        if not ends:
            raise DataFileError(f"{path}: holds no record; at least one is needed")
        self._bytes = np.frombuffer(block, dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> object:
        """The record as JSON gives it: any value. Raises IndexError outside 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return json.loads(self._bytes[start : self._ends[index]].tobytes())


def read_json(path: Path, *, drop: frozenset[str] = frozenset(), allowed: str = "JSON") -> object:
    """What a JSON file holds. drop: keys that are left out of objects at any depth, as soon as one is read: published
    files hold much that nobody asks for. allowed: what the file should be, in words.

    Raises DataFileError with the file, the position and what is allowed.
    """
    return _decode(path, _content(path), first_line=1, drop=drop, allowed=allowed)


def read_json_lines(path: Path) -> list[bytes]:
    """The lines of a file of JSON lines, blank ones left out. Raises DataFileError as `read_json`."""
    lines = []
    # on \n alone: splitlines() also cuts at characters that may stand inside a JSON string
    for number, line in enumerate(_content(path).split(b"\n"), start=1):
        if line.strip():
            _decode(path, line, first_line=number, allowed="one JSON object a line")
            lines.append(line.strip())
    return lines


def to_line(record: object) -> bytes:
    """A record as `RecordFile` keeps it."""
    return json.dumps(record, separators=(",", ":")).encode()


def matching(rows: Iterable[object], where: Mapping[str, Sequence[str | int]], path: Path) -> Iterator[object]:
    """The objects whose fields have one of the values that `where` gives for them. What is no object is no match.

    Raises DataFileError if none matches, naming values that there are.
    """
    if not where:
        yield from rows
        return
    met: dict[str, set[str]] = {key: set() for key in where}
    found = False
    for row in rows:
        values = [row.get(key) for key in where] if isinstance(row, dict) else []
        if values and all(_is_one_of(value, wanted) for value, wanted in zip(values, where.values(), strict=True)):
            found = True
            yield row
        elif not found:
            for key, value in zip(where, values, strict=False):
                if isinstance(value, str | int) and len(met[key]) < _SHOWN:
                    met[key].add(str(value))
    if not found:
        shown = "; ".join(f"{key}: {', '.join(sorted(values)) or 'none'}" for key, values in met.items())
        raise DataFileError(f"{path}: where: {_words(where)}: no record is so; values that there are: {shown}")


def _is_one_of(value: object, wanted: Sequence[str | int]) -> bool:
    # 1 is True to Python, and not in JSON
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in wanted)


def _words(where: Mapping[str, Sequence[str | int]]) -> str:
    return ", ".join(f"{key} {' or '.join(map(str, values))}" for key, values in where.items())


def check_suffix(path: Path, allowed: tuple[str, ...]) -> None:
    """Raises DataFileError unless the file's name ends in one of these."""
    if path.suffix not in allowed:
        raise DataFileError(f"{path}: unknown file format {path.suffix!r}; allowed are {', '.join(allowed)}")


def _content(path: Path) -> bytes:
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataFileError(f"{path}: {what}; give a file of JSON (.json) or JSON lines (.jsonl)")
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def _decode(path: Path, content: bytes, *, first_line: int, drop: frozenset[str] = frozenset(), allowed: str) -> object:
    def keep(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return {key: value for key, value in pairs if key not in drop}

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=keep if drop else None)
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataFileError(f"{path}: line {line}: byte {error.start} is not UTF-8; allowed is UTF-8 text") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataFileError(
            f"{path}: line {line}, column {error.colno}: broken JSON ({error.msg}); allowed is {allowed}"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise DataFileError(f"{path}: from line {first_line} on: JSON that cannot be read ({error})") from error
