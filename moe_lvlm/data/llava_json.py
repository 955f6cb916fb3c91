"""Files of LLaVA records: a JSON list (.json) or one object a line (.jsonl)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.json_files import RecordFile, check_suffix, matching, read_json, read_json_lines, to_line

SUFFIXES = (".json", ".jsonl")


def read_records(path: Path, where: Mapping[str, Sequence[str | int]] | None = None) -> RecordFile:
    """Reads a .json or .jsonl file. where: only records whose fields have these values (`matching`).

    Checks that it is JSON and a list, not what the records hold: that is seen when a record is used. Raises
    DataFileError with the file, the position and what is allowed.
    """
    check_suffix(path, SUFFIXES)
    if path.suffix == ".jsonl":
        lines: Iterable[bytes] = read_json_lines(path)
        return RecordFile(path, map(to_line, matching(map(json.loads, lines), where, path)) if where else lines)
    records = read_json(path, allowed="one JSON list of records")
    if not isinstance(records, list):
        raise DataFileError(
            f"{path}: line 1: the file holds a {type(records).__name__}; allowed is a list of records"
            f" (or one record a line in a {SUFFIXES[1]} file)"
        )
    return RecordFile(path, map(to_line, matching(records, where or {}, path)))
