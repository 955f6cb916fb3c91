"""Weights by name and rows out of Hugging Face folders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_lvlm.checkpoint.layout import CheckpointError
from moe_lvlm.checkpoint.source import SafetensorsSource, open_source


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(4, 3, 2),
        "b.weight": torch.randn(5, 2).bfloat16(),
        "scale": torch.tensor(2.5),
        "ids": torch.arange(6),
    }


def shards(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file({"a.weight": weights["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    rest = {name: tensor for name, tensor in weights.items() if name != "a.weight"}
    save_file(rest, folder / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(rest, "model-00002-of-00002.safetensors")
    weight_map["a.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("is_sharded", [False, True])
def test_safetensors_folders(tmp_path: Path, weights: dict[str, torch.Tensor], is_sharded: bool) -> None:
    if is_sharded:
        shards(tmp_path, weights)
    else:
        save_file(weights, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert set(source.names()) == set(weights)
    for name, tensor in weights.items():
        assert source.shape(name) == tensor.shape
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor)
    assert torch.equal(source.read("a.weight", 1, 3), weights["a.weight"][1:3])
    assert torch.equal(source.read("a.weight", 2), weights["a.weight"][2:])
    assert source.read("a.weight", 2, 2).shape == (0, 3, 2)
    with pytest.raises(ValueError, match=r"rows \[3, 5\) wanted, has 4"):
        source.read("a.weight", 3, 5)
    with pytest.raises(CheckpointError, match="has no weight 'c'"):
        source.read("c")


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "", 1])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, file: object) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"a": torch.ones(1)}, other / "model.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="in the same folder"):
        SafetensorsSource(folder)


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"has pytorch_model\.bin.*can run code"):
        open_source(tmp_path)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_source(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"has notes\.txt; allowed are"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        open_source(tmp_path)
