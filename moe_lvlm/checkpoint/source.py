"""Weights by name and rows, for building a model: out of our checkpoints, or out of Hugging Face safetensors folders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from moe_lvlm.checkpoint.base import Base, BaseTensor
from moe_lvlm.checkpoint.layout import (
    BASE_FILE,
    DTYPES,
    INDEX_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointError,
    Entry,
    Kind,
    read_json,
)
from moe_lvlm.checkpoint.reader import Checkpoint, row_elements

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Model weights that can be read a tensor, or some of its rows, at a time."""

    def names(self) -> Sequence[str]:
        """All tensors, in a fixed order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of dimension 0 on the CPU; None means from the first, to the last."""
        ...


def open_source(path: Path) -> WeightSource:
    """The weights in a folder. Raises CheckpointError on any but a checkpoint of ours or a safetensors folder."""
    path = Path(path)
    if (path / MANIFEST_FILE).is_file() or (path / INDEX_FILE).is_file():
        return CheckpointSource(Checkpoint(path))
    if (path / SAFETENSORS_INDEX).is_file() or (path / SAFETENSORS_FILE).is_file():
        return SafetensorsSource(path)
    allowed = f"allowed are a checkpoint ({MANIFEST_FILE}), {SAFETENSORS_FILE} or {SAFETENSORS_INDEX}"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; {allowed}")
    found = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        allowed += "; pickle files (.bin, .pt, .pth) can run code when they are loaded, save them as safetensors first"
    raise CheckpointError(f"{path}: has {', '.join(found[:10]) or 'nothing'}; {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor of known shape and type that is computed when it is read.

    read: rows [start, stop) of dimension 0, on the CPU in `dtype`; (0, 1) for a tensor without dimensions.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """The same values in another type; None leaves it."""
        if dtype is None or dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, read=lambda start, stop: self.read(start, stop).to(dtype))

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        """A tensor that is there."""
        return LazyTensor(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            read=lambda start, stop: tensor[start:stop] if tensor.dim() else tensor,
        )

    @staticmethod
    def from_source(source: WeightSource, name: str) -> LazyTensor:
        """A tensor of a source as it is."""
        return LazyTensor(
            shape=source.shape(name), dtype=source.dtype(name), read=lambda start, stop: source.read(name, start, stop)
        )


class LazySource:
    """Weights that are computed from others while they are read: what a conversion is.

    A conversion is a function from a source to a source; it can be written to a folder, or fill a model directly.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors = dict(tensors)

    def to(self, dtype: torch.dtype | None) -> LazySource:
        """The same with floating-point weights of another type; None leaves them."""
        return LazySource(
            {name: one.to(dtype) if one.dtype.is_floating_point else one for name, one in self.tensors.items()}
        )

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        tensor = self._tensor(name)
        first, last = 0 if start is None else start, tensor.num_rows if stop is None else stop
        if not 0 <= first <= last <= tensor.num_rows:
            raise ValueError(f"{name}: rows [{first}, {last}) wanted, has {tensor.num_rows}")
        return tensor.read(first, last)

    def _tensor(self, name: str) -> LazyTensor:
        if name not in self.tensors:
            raise CheckpointError(f"no weight {name!r} among {len(self.tensors)}")
        return self.tensors[name]


class BaseSource:
    """The weights that a checkpoint leaves out, out of the folders that hold them, in the types that the run had.

    Raises CheckpointError if a folder is missing or is not what it was.
    """

    def __init__(self, base: Base, checkpoint: Path) -> None:
        base.check(checkpoint)
        self._base = base
        self._sources = [open_source(folder.path()) for folder in base.folders]
        there = [frozenset(source.names()) for source in self._sources]
        for name, tensor in base.tensors.items():
            if tensor.name not in there[tensor.folder]:
                folder = base.folders[tensor.folder].folder
                raise CheckpointError(f"{checkpoint}: {name} is {tensor.name} of {folder}, which has no such weight")

    def names(self) -> Collection[str]:
        """Of the weights, in the model."""
        return self._base.tensors.keys()

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of dimension 0."""
        tensor = self._base.tensors[name]
        return self._sources[tensor.folder].read(tensor.name, start, stop).to(tensor.dtype)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D."""
        shape = self._base.tensors[name].shape
        if not shape or start >= stop:
            return self.read(name).reshape(-1)[start:stop]
        width = math.prod(shape[1:])
        first = start // width
        rows = self.read(name, first, -(-stop // width)).reshape(-1)
        return rows[start - first * width : stop - first * width]


class CheckpointSource:
    """Weights of one of our checkpoints: the float32 master where there is one, else the stored weight, or the base's.

    Raises CheckpointError if the checkpoint leaves weights out and their folder is missing or is not what it was.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._kinds: dict[str, Kind] = {
            name: "master" if "master" in kinds else "weight" for name, kinds in checkpoint.index.tensors.items()
        }
        self._left_out: Mapping[str, BaseTensor] = {} if checkpoint.base is None else checkpoint.base.tensors
        self._base = None if checkpoint.base is None else BaseSource(checkpoint.base, checkpoint.path)

    def names(self) -> Sequence[str]:
        return [*self._kinds, *self._left_out]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        shape = self.shape(name)
        first, last = row_elements(shape, start, stop, f"{self._checkpoint.path}: {name}")
        if self._base is not None and name in self._left_out:
            return self._base.read(name, start, stop)
        values = self._checkpoint.read(name, self._kinds[name], first, last)
        return values.view(_rows_shape(shape, start, stop))

    def _entry(self, name: str) -> Entry | BaseTensor:
        if name in self._left_out:
            return self._left_out[name]
        entry = self._checkpoint.entry(name, self._kinds[name]) if name in self._kinds else None
        if entry is None:
            raise CheckpointError(f"{self._checkpoint.path}: has no weight {name!r}")
        return entry


class SafetensorsSource:
    """Weights of a folder with `model.safetensors`, or with shards and their index."""

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self._files: dict[str, Any] = {}
        if (self._path / SAFETENSORS_INDEX).is_file():
            self._file_of = read_weight_map(self._path / SAFETENSORS_INDEX)
        else:
            self._file_of = dict.fromkeys(self._open(SAFETENSORS_FILE).keys(), SAFETENSORS_FILE)

    def names(self) -> Sequence[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise CheckpointError(f"{self._path}: {name} is {stored}, allowed are {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        shape = self.shape(name)
        row_elements(shape, start, stop, f"{self._path}: {name}")
        if not shape:
            return self._open(self._file_of[name]).get_tensor(name)
        return self._slice(name)[start:stop]

    def files(self, names: Collection[str]) -> set[str]:
        """The files that hold these tensors, and their index."""
        index = {SAFETENSORS_INDEX} if (self._path / SAFETENSORS_INDEX).is_file() else set()
        return index | {self._file_of[name] for name in names}

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self._path}: has no weight {name!r}")
        try:
            return self._open(self._file_of[name]).get_slice(name)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{self._path / self._file_of[name]}: {name}: {error}") from error

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safetensors.safe_open(self._path / file, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._path / file}: not a readable safetensors file: {error}") from error
        return self._files[file]


def source_files(path: Path, names: Collection[str]) -> set[str]:
    """The files of a folder that `open_source` reads these tensors out of, those that say where they are among them."""
    if not (path / MANIFEST_FILE).is_file() and not (path / INDEX_FILE).is_file():
        return SafetensorsSource(path).files(names)
    checkpoint = Checkpoint(path)
    pieces = (
        piece for name in names for entry in checkpoint.index.tensors.get(name, {}).values() for piece in entry.ranges
    )
    documents = {INDEX_FILE, STATE_FILE} | (set() if checkpoint.base is None else {BASE_FILE})
    return documents | {piece.file for piece in pieces}


def read_weight_map(where: Path) -> dict[str, str]:
    """Tensor name -> file name of an index in Hugging Face's form. Raises CheckpointError if it names files elsewhere."""
    data = read_json(where)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{where}: has no weight_map: {json.dumps(data)[:80]}")
    for name, file in weight_map.items():
        # a plain file name: nothing in a downloaded index may make us open a file elsewhere
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{where}: {name} is in {file!r}, allowed are names of files in the same folder")
    return dict(weight_map)


def _rows_shape(shape: tuple[int, ...], start: int | None, stop: int | None) -> tuple[int, ...]:
    if not shape:
        return ()
    return ((shape[0] if stop is None else stop) - (start or 0), *shape[1:])
