"""Weights of a folder with `pytorch_model.bin` shards, as models were published before safetensors.

A pickle can run code when it is loaded. These are read with torch's restricted unpickler, which knows tensors and
plain containers only, and mapped into memory: a tensor is read from the disk when its rows are asked for.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lvlm.checkpoint.layout import CheckpointError
from moe_lvlm.checkpoint.reader import row_elements
from moe_lvlm.checkpoint.source import (
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    WeightSource,
    open_source,
    read_weight_map,
)

BIN_FILE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


def open_weights(folder: Path) -> WeightSource:
    """The weights in a folder, .bin shards included where it has no safetensors. Raises CheckpointError on any other."""
    has_safetensors = (folder / SAFETENSORS_FILE).is_file() or (folder / SAFETENSORS_INDEX).is_file()
    if not has_safetensors and ((folder / BIN_FILE).is_file() or (folder / BIN_INDEX).is_file()):
        return BinSource(folder)
    return open_source(folder)


class BinSource:
    """Weights of `pytorch_model.bin`, or of shards and their index."""

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._files: dict[str, dict[str, Tensor]] = {}
        if (self._path / BIN_INDEX).is_file():
            self._file_of = read_weight_map(self._path / BIN_INDEX)
        else:
            self._file_of = dict.fromkeys(self._open(BIN_FILE), BIN_FILE)

    def names(self) -> Sequence[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        tensor = self._tensor(name)
        row_elements(tuple(tensor.shape), start, stop, f"{self._path}: {name}")
        return tensor[start:stop] if tensor.dim() else tensor

    def _tensor(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise CheckpointError(f"{self._path}: has no weight {name!r}")
        file = self._file_of[name]
        tensors = self._open(file)
        if name not in tensors:
            raise CheckpointError(f"{self._path / file}: has no weight {name!r}, though the index says so")
        return tensors[name]

    def _open(self, file: str) -> dict[str, Tensor]:
        if file not in self._files:
            self._files[file] = _load(self._path / file)
        return self._files[file]


def load_restricted(path: Path) -> Any:
    """What a file of torch holds: tensors, which stay on the disk, and plain data. Raises CheckpointError."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, since it holds more than tensors and could run code: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be mapped into memory (damaged, or saved by a torch before 1.6: load it there and save it "
            f"as safetensors): {_first_line(error)}"
        ) from error


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, though the index names it")
    loaded = load_restricted(path)
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise CheckpointError(f"{path}: holds {type(loaded).__name__}; allowed: a mapping of names to tensors")
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
