"""`pytorch_model.bin`: read by name and rows, mapped into memory, and never unpickled as code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from moe_lvlm.checkpoint.layout import CheckpointError
from moe_lvlm.checkpoint.source import SafetensorsSource
from moe_lvlm.conversion.bin_shards import BinSource, open_weights
from tests.conversion.layouts import Weights, save_bin_shards, save_safetensors


@pytest.fixture
def weights() -> Weights:
    torch.manual_seed(0)
    return {"a": torch.randn(4, 3), "b": torch.randn(5).bfloat16(), "scale": torch.tensor(2.5)}


class Touch:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("is_sharded", [False, True])
def test_reading(weights: Weights, is_sharded: bool, tmp_path: Path) -> None:
    if is_sharded:
        save_bin_shards(tmp_path, weights)
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    source = open_weights(tmp_path)
    assert isinstance(source, BinSource)
    assert set(source.names()) == set(weights)
    for name, value in weights.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(value.shape), value.dtype)
        assert torch.equal(source.read(name), value)
    assert torch.equal(source.read("a", 1, 3), weights["a"][1:3])
    with pytest.raises(ValueError, match=r"rows \[3, 5\) wanted, has 4"):
        source.read("a", 3, 5)
    with pytest.raises(CheckpointError, match="has no weight 'c'"):
        source.read("c")


def test_safetensors_go_first(weights: Weights, tmp_path: Path) -> None:
    save_safetensors(tmp_path, weights)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert isinstance(open_weights(tmp_path), SafetensorsSource)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("has_zip", [False, True])
def test_code_is_refused_and_does_not_run(has_zip: bool, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content = {"a": Touch(trap)}
    if has_zip:
        torch.save(content, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_weights(tmp_path)
    assert not trap.exists()
    if has_zip:
        with pytest.raises(CheckpointError, match="refused, since it holds more than tensors and could run code"):
            open_weights(tmp_path)


@pytest.mark.parametrize("file", ["../other/pytorch_model.bin", "/etc/passwd", "..", "sub/model.bin", "", 1])
def test_an_index_cannot_name_files_elsewhere(file: object, weights: Weights, tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "folder"
    other.mkdir()
    folder.mkdir()
    torch.save(weights, other / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="in the same folder"):
        open_weights(folder)


def test_damage(weights: Weights, tmp_path: Path) -> None:
    save_bin_shards(tmp_path, weights)
    index = tmp_path / "pytorch_model.bin.index.json"
    known = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**known, "c": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(CheckpointError, match="has no weight 'c', though the index says so"):
        open_weights(tmp_path).shape("c")
    first = tmp_path / "pytorch_model-00001-of-00002.bin"
    first.write_bytes(first.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cannot be mapped into memory"):
        open_weights(tmp_path).shape("a")
    first.unlink()
    with pytest.raises(CheckpointError, match="no such file, though the index names it"):
        open_weights(tmp_path).shape("a")


def test_what_is_no_mapping_of_tensors(weights: Weights, tmp_path: Path) -> None:
    for content in ([weights["a"]], {"model": weights}, {1: weights["a"]}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="allowed: a mapping of names to tensors"):
            open_weights(tmp_path)


def test_an_old_torch_file(weights: Weights, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"saved by a torch before 1\.6"):
        open_weights(tmp_path)
