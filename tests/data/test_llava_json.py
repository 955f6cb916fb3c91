from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.llava_json import read_records

RECORDS = [{"id": "ü", "n": [1, 2.5, None]}, "text", 7, {"id": 3, "a": "line\nbreak \u2028 here"}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_records_come_back_as_json_gives_them(tmp_path: Path, suffix: str, bom: bytes) -> None:
    path = tmp_path / f"records{suffix}"
    text = (
        json.dumps(RECORDS, ensure_ascii=False)
        if suffix == ".json"
        else "\n\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\r\n"
    )
    path.write_bytes(bom + text.encode())
    records = read_records(path)
    assert [records[index] for index in range(len(records))] == RECORDS
    for outside in (-1, len(RECORDS)):
        with pytest.raises(IndexError, match="of 4"):
            records[outside]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"id": 1},\n {"id": }]', "line 2, column 9: broken JSON"),
        ("a.json", b'{"id": 1}', "holds a dict; allowed is a list"),
        ("a.json", b"[]", "holds no record"),
        ("a.json", b"", "line 1, column 1: broken JSON"),
        ("a.json", b'["a",\n"\xff"]', "line 2: byte 7 is not UTF-8"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.json", b"[" + b"1" * 5000 + b"]", "cannot be read"),
        ("a.jsonl", b'{"id": 1}\n\n{"id": 2\n', "line 3, column .*broken JSON .*allowed is one JSON object a line"),
        ("a.jsonl", b"\n \n", "holds no record"),
        ("a.csv", b"1", r"unknown file format '.csv'; allowed are .json, .jsonl"),
    ],
)
def test_a_broken_file_is_refused_at_once(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="does not exist"):
        read_records(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataFileError, match="is not a file"):
        read_records(tmp_path / "folder.json")
