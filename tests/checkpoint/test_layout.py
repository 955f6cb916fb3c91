"""The index: its JSON form, its coverage, and names that must not lead out of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lvlm.checkpoint.layout import CheckpointError, Entry, Index, Range, check_name


def index_of(*ranges: tuple[int, int], shape: tuple[int, ...] = (2, 5)) -> Index:
    pieces = tuple(Range(start, stop, "rank-00000.safetensors", f"w:{start}") for start, stop in ranges)
    return Index({"w": {"master": Entry(dtype=torch.float32, shape=shape, ranges=pieces)}})


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ([(0, 10)], None),
        ([(6, 10), (0, 6)], None),
        ([(0, 4), (6, 10)], "no file has [4, 6)"),
        ([(0, 6), (5, 10)], "more than one file has [5, 6)"),
        ([(0, 10), (0, 10)], "more than one file has [0, 10)"),
        ([(0, 9)], "no file has [9, 10)"),
        ([], "no file has [0, 10)"),
        ([(0, 11)], "outside of 10 elements"),
    ],
)
def test_ranges_must_cover_each_element_once(ranges: list[tuple[int, int]], problem: str | None) -> None:
    problems = index_of(*ranges).problems()
    assert problems == [] if problem is None else problem in problems[0]


def test_an_empty_tensor_needs_no_element_and_a_scalar_one() -> None:
    assert index_of((0, 0), shape=(0, 4)).problems() == []
    assert index_of((0, 1), shape=()).problems() == []
    assert index_of(shape=()).problems() != []


def test_json_and_back() -> None:
    entry = Entry(dtype=torch.bfloat16, shape=(3,), ranges=(Range(0, 3, "rank-00012.safetensors", "k"),), step=7.0)
    index = Index({"a.b": {"exp_avg": entry}})
    assert Index.from_json(index.to_json(), Path("index.json")) == index


@pytest.mark.parametrize(
    "file",
    ["../rank-00000.safetensors", "/etc/passwd", "rank-00000.safetensors/../../x", "config.json", "", "rank-1.bin", 3],
)
def test_a_range_cannot_point_out_of_the_folder(file: Any) -> None:
    data = index_of((0, 10)).to_json()
    data["tensors"]["w"]["master"]["ranges"][0][2] = file
    with pytest.raises(CheckpointError, match=r"allowed are names like rank-00000\.safetensors"):
        Index.from_json(data, Path("index.json"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.update(format_version=2),
        lambda data: data.pop("tensors"),
        lambda data: data["tensors"]["w"].update(gradient=data["tensors"]["w"]["master"]),
        lambda data: data["tensors"]["w"]["master"].update(dtype="F8"),
        lambda data: data["tensors"]["w"]["master"].update(shape=[-2, -5]),
        lambda data: data["tensors"]["w"]["master"].update(ranges=[[0, 10]]),
        lambda data: data["tensors"].update(w=3),
    ],
)
def test_an_index_of_another_form_is_refused(damage: Any) -> None:
    data = index_of((0, 10)).to_json()
    damage(data)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Index.from_json(data, Path("index.json"))


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "latest", "a b", "a\n"])
def test_checkpoint_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="checkpoint name"):
        check_name(name)
