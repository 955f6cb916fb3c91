"""Reading a checkpoint: any range of any logical tensor, from whichever files hold it, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from moe_lvlm.checkpoint import layout
from moe_lvlm.checkpoint.base import read_base
from moe_lvlm.checkpoint.layout import CheckpointError, Entry, Index, Kind, Range, check_format, read_json


class Checkpoint:
    """An open checkpoint folder. Opening it checks the index, not the files' contents: that is `verify`.

    config: the model's configuration. state: where training stood. base: where the weights are that it leaves out, None
    if it holds all; only `source` reads them. Raises CheckpointError on a damaged folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config: Mapping[str, Any] = read_json(self.path / layout.CONFIG_FILE)
        self.state: Mapping[str, Any] = read_json(self.path / layout.STATE_FILE)
        self.base = read_base(self.path)
        check_format(self.state, self.path / layout.STATE_FILE, allowed=layout.FORMAT_VERSIONS)
        if (self.state["format_version"] == layout.FORMAT_WITH_BASE) == (self.base is None):
            is_there = "missing" if self.base is None else "there"
            raise CheckpointError(
                f"{self.path / layout.BASE_FILE}: {is_there}, but {layout.STATE_FILE} has format_version "
                f"{self.state['format_version']}"
            )
        self.index = read_index(self.path)
        self._files: dict[str, Any] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all logical tensors, those that it leaves out too."""
        held = {name: next(iter(kinds.values())).shape for name, kinds in self.index.tensors.items() if kinds}
        return held | ({} if self.base is None else {name: one.shape for name, one in self.base.tensors.items()})

    def entry(self, name: str, kind: Kind) -> Entry | None:
        """What the checkpoint knows of a logical tensor, None if it has none of that kind."""
        return self.index.tensors.get(name, {}).get(kind)

    def read_into(self, target: Tensor, name: str, kind: Kind, start: int) -> None:
        """Fill a 1-D tensor with elements [start, start + target.numel()) of a flattened logical tensor.

        The target may be of another dtype or device. Raises CheckpointError if the checkpoint has no such elements.
        """
        entry = self.entry(name, kind)
        stop = start + target.numel()
        if entry is None or not 0 <= start <= stop <= entry.numel:
            have = "none" if entry is None else f"{entry.numel} elements"
            raise CheckpointError(f"{self.path}: elements [{start}, {stop}) of {name} ({kind}) wanted, has {have}")
        for piece in entry.ranges:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                target[first - start : last - start].copy_(self._read(piece, first, last))

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened logical tensor, in its stored dtype, on the CPU."""
        entry = self.entry(name, kind)
        dtype = torch.float32 if entry is None else entry.dtype
        values = torch.empty(max(stop - start, 0), dtype=dtype)
        self.read_into(values, name, kind, start)
        return values

    def view(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """What `read` gives, not to be written to: where one range has all of it, it is the file's own memory.

        So it costs no copy and no memory of the process; the file must not shrink as long as it is used.
        """
        entry = self.entry(name, kind)
        for piece in () if entry is None else entry.ranges:
            if piece.start <= start < stop <= piece.stop:
                return self._read(piece, start, stop)
        return self.read(name, kind, start, stop)

    def names_in_file_order(self) -> list[str]:
        """All logical tensors, by where their first ranges lie: read so, each file is read from front to back."""
        places: dict[tuple[str, str], int] = {}
        for file in sorted(self.index.files()):
            places |= {(file, key): place for place, key in enumerate(self._open(file).offset_keys())}

        def first(name: str) -> tuple[str, int]:
            ranges = [piece for entry in self.index.tensors[name].values() for piece in entry.ranges[:1]]
            return min(((one.file, places.get((one.file, one.key), 0)) for one in ranges), default=("", 0))

        return sorted(self.index.tensors, key=first)

    def open_files(self) -> None:
        """Open all files with ranges, which otherwise happens when they are first read; then threads may read."""
        for file in sorted(self.index.files()):
            self._open(file)

    def rng(self, rank: int) -> dict[str, Tensor] | None:
        """The generators of that rank of the run that saved, None if it had no such rank: `restore_rng`."""
        path = self.path / layout.rng_file(rank)
        return safetensors.torch.load_file(path) if path.is_file() else None

    def _read(self, piece: Range, start: int, stop: int) -> Tensor:
        try:
            part: Tensor = self._open(piece.file).get_slice(piece.key)[start - piece.start : stop - piece.start]
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / piece.file}: {piece.key}: {error}") from error
        if part.numel() != stop - start:
            raise CheckpointError(
                f"{self.path / piece.file}: {piece.key} has fewer elements than the {piece.stop - piece.start} "
                f"that {layout.INDEX_FILE} says"
            )
        return part

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safetensors.safe_open(self.path / file, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.path / file}: {error}") from error
        return self._files[file]


def read_index(path: Path) -> Index:
    """A checkpoint folder's index. Raises CheckpointError if its ranges have holes or overlaps."""
    index = Index.from_json(read_json(path / layout.INDEX_FILE), path / layout.INDEX_FILE)
    if problems := index.problems():
        raise CheckpointError(f"{path}: {'; '.join(problems[:5])}")
    return index


def row_elements(shape: tuple[int, ...], start: int | None, stop: int | None, what: str) -> tuple[int, int]:
    """Flat range of the rows [start, stop) of dimension 0; None means from the first, to the last."""
    rows = shape[0] if shape else 1
    first, last = 0 if start is None else start, rows if stop is None else stop
    if not 0 <= first <= last <= rows:
        raise ValueError(f"{what}: rows [{first}, {last}) wanted, has {rows}")
    width = math.prod(shape[1:])
    return first * width, last * width
