from __future__ import annotations

from typing import Any

import pytest

from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.records import Record, Turn, parse_record

Q = {"from": "human", "value": "<image>\nq"}
A = {"from": "gpt", "value": "a"}


def test_a_record_becomes_typed() -> None:
    raw = {"id": 7, "image": ["x.png", "y.png"], "task": "where", "mask": "m.png", "model": "", "conversations": [
        {"from": "human", "value": "<image><image>\nq"}, A]}  # fmt: skip
    turns = (Turn("human", "<image><image>\nq"), Turn("gpt", "a"))
    assert parse_record(raw) == Record(id="7", images=("x.png", "y.png"), turns=turns, task="where", mask="m.png")
    assert parse_record({"conversations": [{"from": "human", "value": "q"}, A]}).images == ()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "the record is null"),
        ([Q, A], "the record is a list"),
        ("text", "the record is a string"),
        ({"image": "x.png"}, "`conversations` is missing"),
        ({"conversations": "text"}, "conversations is a string"),
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": [Q, "a"]}, r"conversations\[1\] is a string"),
        ({"conversations": [{"from": "system", "value": "s"}]}, "from is \"system\"; allowed are human and gpt"),
        ({"conversations": [A, Q]}, r"conversations\[0\].from is 'gpt'.*'human' belongs here"),
        ({"conversations": [Q, Q]}, r"conversations\[1\].from is 'human'.*'gpt' belongs here"),
        ({"conversations": [Q, A, Q], "image": "x.png"}, "the last turn is a human's"),
        ({"conversations": [Q, {"from": "gpt", "value": 3}]}, r"conversations\[1\].value is a number: 3"),
        ({"conversations": [Q, {"from": "gpt"}]}, r"conversations\[1\].value is null"),
        ({"conversations": [Q, {"from": "gpt", "value": " \n"}]}, "empty answer"),
        ({"conversations": [Q, {"from": "gpt", "value": "an <image>"}]}, "stands in an answer"),
        ({"conversations": [Q, {"from": "gpt", "value": "\ud800"}]}, "lone surrogate at character 0"),
        ({"conversations": [Q, A]}, "hold 1 <image> mark.* names 0"),
        ({"conversations": [Q, A], "image": ["x.png", "y.png"]}, "hold 1 <image> mark.* names 2"),
        ({"conversations": [Q, A], "image": 5}, "image is a number: 5"),
        ({"conversations": [Q, A], "image": [None]}, "image is null"),
        ({"conversations": [Q, A], "image": ""}, "image is an empty path"),
        ({"conversations": [Q, A], "image": "x.png", "task": {}}, "task is an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(raw: Any, reason: str) -> None:
    with pytest.raises(RecordFault, match=reason):
        parse_record(raw)
