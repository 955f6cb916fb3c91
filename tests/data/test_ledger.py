from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_lvlm.data.errors import BadRecordError, TooManyBadSamplesError
from moe_lvlm.data.ledger import BadSampleLedger


def bad(index: int, file: str = "f.json") -> BadRecordError:
    return BadRecordError(file, index, f"id{index}", f"f/{index}", f"reason {index}")


def listed(path: Path) -> list[tuple[str, int]]:
    return [(entry["file"], entry["record"]) for entry in map(json.loads, path.read_text().splitlines())]


def test_each_bad_record_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"
    ledger = BadSampleLedger(path, limit=0.5, epoch_size=10)
    ledger.add([])
    assert not path.exists()
    ledger.add([bad(1), bad(2), bad(1)])
    ledger.add([bad(2), bad(2, "g.json")])
    assert listed(path) == [("f.json", 1), ("f.json", 2), ("g.json", 2)]
    assert json.loads(path.read_text().splitlines()[0]) == {
        "file": "f.json", "record": 1, "id": "id1", "key": "f/1", "reason": "reason 1",
    }  # fmt: skip


def test_a_resumed_run_goes_on_with_the_list(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    BadSampleLedger(path, limit=0.5, epoch_size=10).add([bad(1), bad(2)])
    with path.open("a") as lines:
        lines.write('{"file": "f.js')  # killed here
    ledger = BadSampleLedger(path, limit=0.5, epoch_size=10)
    assert ledger.num_listed == 2
    ledger.add([bad(2), bad(3)])
    assert listed(path) == [("f.json", 1), ("f.json", 2), ("f.json", 3)]


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"file": "f", "record": 1, "reason": ""}\n[1]\n')
    with pytest.raises(ValueError, match="line 2 is not"):
        BadSampleLedger(path, limit=0.5, epoch_size=10)


def test_the_run_stops_above_the_limit(tmp_path: Path) -> None:
    ledger = BadSampleLedger(tmp_path / "bad_samples.jsonl", limit=0.01, epoch_size=1000)
    ledger.add(bad(index) for index in range(5))
    assert ledger.share == 0.0
    ledger.check(10, 20)  # half of the first twenty, but one per cent of the epoch
    assert ledger.share == 0.5
    ledger.check(30, 3000)
    with pytest.raises(TooManyBadSamplesError) as caught:
        ledger.check(11, 20)
    message = str(caught.value)
    for part in ("11 of 20", "55.00%", "0.01", "allows 10", "bad_samples.jsonl", "f.json: record 2: reason 2"):
        assert part in message
    assert "reason 3" not in message
    with pytest.raises(TooManyBadSamplesError, match="allows 30"):
        ledger.check(31, 3000)


def test_a_limit_of_nothing_allows_nothing(tmp_path: Path) -> None:
    ledger = BadSampleLedger(tmp_path / "bad_samples.jsonl", limit=0.0, epoch_size=1000)
    ledger.check(0, 50)
    with pytest.raises(TooManyBadSamplesError):
        ledger.check(1, 50)
