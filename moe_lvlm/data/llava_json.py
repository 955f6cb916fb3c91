"""Files of LLaVA records: a JSON list (.json) or one object a line (.jsonl)."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import numpy as np

from moe_lvlm.data.errors import DataFileError

SUFFIXES = (".json", ".jsonl")


class RecordFile:
    """The records of one file, each still as JSON text, decoded when it is asked for.

    One block of bytes in place of millions of Python objects: small, and shared with worker processes (objects are
    copied as soon as their reference counts change).
    """

    def __init__(self, path: Path, lines: list[bytes]) -> None:
        self.path = path
        self._bytes = np.frombuffer(b"".join(lines), dtype=np.uint8)
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> object:
        """The record as JSON gives it: any value. Raises IndexError outside 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return json.loads(self._bytes[start : self._ends[index]].tobytes())


def read_records(path: Path) -> RecordFile:
    """Reads a .json or .jsonl file.

    Checks that it is JSON and a list, not what the records hold: that is seen when a record is used. Raises
    DataFileError with the file, the position and what is allowed.
    """
    if path.suffix not in SUFFIXES:
        raise DataFileError(f"{path}: unknown file format {path.suffix!r}; allowed are {', '.join(SUFFIXES)}")
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataFileError(f"{path}: {what}; give a JSON list ({SUFFIXES[0]}) or JSON lines ({SUFFIXES[1]})")
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = _list_lines(path, content) if path.suffix == ".json" else _checked_lines(path, content)
    if not lines:
        raise DataFileError(f"{path}: holds no record; at least one is needed")
    return RecordFile(path, lines)


def _list_lines(path: Path, content: bytes) -> list[bytes]:
    records = _decode(path, content, first_line=1)
    if not isinstance(records, list):
        raise DataFileError(
            f"{path}: line 1: the file holds a {type(records).__name__}; allowed is a list of records"
            f" (or one record a line in a {SUFFIXES[1]} file)"
        )
    return [json.dumps(record, separators=(",", ":")).encode() for record in records]


def _checked_lines(path: Path, content: bytes) -> list[bytes]:
    lines = []
    # on \n alone: splitlines() also cuts at characters that may stand inside a JSON string
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            _decode(path, line, first_line=number)
            lines.append(line.strip())
    return lines


def _decode(path: Path, content: bytes, *, first_line: int) -> object:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataFileError(f"{path}: line {line}: byte {error.start} is not UTF-8; allowed is UTF-8 text") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataFileError(
            f"{path}: line {line}, column {error.colno}: broken JSON ({error.msg}); allowed is "
            + ("one JSON list of records" if path.suffix == ".json" else "one JSON object a line")
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise DataFileError(f"{path}: from line {first_line} on: JSON that cannot be read ({error})") from error
