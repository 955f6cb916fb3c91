"""Statements that are true or not, asked as questions with the answers yes and no: VSR, Hateful Memes.

The words follow the zero-shot prompts of InstructBLIP (appendix E): 'Based on the image, is this statement true or false?
"..."', whose answers are true and false there, and 'This is an image with: "..." written on it. Is it hateful?'.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from moe_lvlm.data.json_files import check_suffix, read_json_lines
from moe_lvlm.data.published.dataset import Dataset, Fields, Files, Item, int_of, text_of


def _read(files: Files) -> Iterator[object]:
    check_suffix(files.path, (".jsonl",))
    return map(json.loads, read_json_lines(files.path))


def _item(fields: Fields, question: str) -> Item:
    answer = ("no", "yes")[int_of(fields, "label", range(2))]
    return Item(question=question, answers=(answer,), answer=answer)


def _parse_vsr(fields: Fields) -> Item:
    return _item(fields, f'Based on the image, is this statement true? "{text_of(fields, "caption")}"')


def _parse_memes(fields: Fields) -> Item:
    return _item(fields, f'This is an image with: "{text_of(fields, "text")}" written on it. Is it hateful?')


VSR = Dataset(read=_read, parse=_parse_vsr, id_key="image", image_pattern="{image}")
HATEFUL_MEMES = Dataset(read=_read, parse=_parse_memes, id_key="id", image_pattern="{img}")
