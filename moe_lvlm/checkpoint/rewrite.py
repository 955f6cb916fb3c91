"""Writing a checkpoint that is not in training: out of another one, or out of another format. One process.

Tensors are read flat, a piece at a time, while they are written: memory stays at one piece, whatever the model's size.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lvlm.checkpoint import layout
from moe_lvlm.checkpoint.documents import SLACK_BYTES, write_documents
from moe_lvlm.checkpoint.files import (
    CHUNK_BYTES,
    Advance,
    FileRecord,
    StreamedTensor,
    require_free_bytes,
    write_safetensors,
)
from moe_lvlm.checkpoint.folder import Log, publish, temporary_path, tidy
from moe_lvlm.checkpoint.layout import Entry, Index, Kind, Range, check_name
from moe_lvlm.checkpoint.save import SaveReport

_PARTS_OF_A_TENSOR = 2**20  # bytes below which a tensor is not divided between two files


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatTensor:
    """One kind of one logical tensor, still to be read.

    read: elements [start, stop) of the flattened tensor, 1-D on the CPU, in `dtype`.
    step: the optimizer's count of steps, with moments only.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    step: float | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


# Logical tensors: name -> kind -> tensor
FlatTensors = Mapping[str, Mapping[Kind, FlatTensor]]


def total_bytes(tensors: FlatTensors) -> int:
    """Bytes of all elements."""
    return sum(tensor.num_bytes for kinds in tensors.values() for tensor in kinds.values())


def write_checkpoint(
    directory: Path,
    name: str,
    tensors: FlatTensors,
    *,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    rng: Sequence[Mapping[str, Tensor]] = (),
    num_files: int = 1,
    log: Log,
    advance: Advance = lambda num_bytes: None,
) -> SaveReport:
    """Write `directory`/`name` and make it the latest, as atomically as a save in training.

    config: the model's configuration. state: all of state.json but its format version. rng: the generators of each
    rank that saved. num_files: among how many files the tensors go, by bytes; parts of a tensor may lie in two files.
    advance: told of the bytes written, out of `total_bytes`.

    Raises:
        OSError: the disk is full, or fails; nothing is left behind then.
    """
    started = time.monotonic()
    directory = Path(directory)
    temporary = temporary_path(directory, check_name(name))
    directory.mkdir(parents=True, exist_ok=True)
    require_free_bytes(directory, total_bytes(tensors) + SLACK_BYTES)
    tidy(directory, log)
    temporary.mkdir()
    try:
        index = plan_files(tensors, num_files)
        records: dict[str, FileRecord] = {}
        for file in sorted(index.files()) or [layout.rank_file(0)]:
            records[file] = write_safetensors(temporary / file, list(_of_file(tensors, index, file)), advance=advance)
        for rank, generators in enumerate(rng):
            streams = [StreamedTensor.of(key, tensor) for key, tensor in generators.items()]
            records[layout.rng_file(rank)] = write_safetensors(temporary / layout.rng_file(rank), streams)
        everything = {**state, "format_version": layout.FORMAT_VERSION}
        size = write_documents(temporary, records, index=index, config=config, state=everything)
        publish(directory, name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # what stays is removed by the next save
        raise
    return SaveReport(directory / name, size, time.monotonic() - started)


def plan_files(tensors: FlatTensors, num_files: int) -> Index:
    """Where each range goes: files of nearly equal size, the tensors one after the other."""
    if num_files < 1:
        raise ValueError(f"number of files: {num_files}; allowed: 1 and above")
    share = max(total_bytes(tensors) / num_files, 1)
    planned: dict[str, dict[Kind, Entry]] = {}
    offset = 0
    for name, kinds in tensors.items():
        for kind, tensor in kinds.items():
            ranges = []
            for start, stop in pairwise(_edges(tensor, offset, share)):
                file = layout.rank_file(min(int((offset + start * tensor.dtype.itemsize) / share), num_files - 1))
                ranges.append(Range(start, stop, file, f"{name}:{kind}:{start}"))
            planned.setdefault(name, {})[kind] = Entry(
                dtype=tensor.dtype, shape=tensor.shape, ranges=tuple(ranges), step=tensor.step
            )
            offset += tensor.num_bytes
    return Index(planned)


def _edges(tensor: FlatTensor, offset: int, share: float) -> list[int]:
    """Elements at which a tensor that begins at byte `offset` of all passes from one file to the next."""
    edges = [0]
    first, last = int(offset / share) + 1, math.ceil((offset + tensor.num_bytes) / share)
    if tensor.num_bytes >= _PARTS_OF_A_TENSOR:
        for file in range(first, last):
            edge = math.ceil((file * share - offset) / tensor.dtype.itemsize)
            if edges[-1] < edge < tensor.numel:
                edges.append(edge)
    return [*edges, tensor.numel]


def _of_file(tensors: FlatTensors, index: Index, file: str) -> Iterator[StreamedTensor]:
    for name, kinds in index.tensors.items():
        for kind, entry in kinds.items():
            for piece in entry.ranges:
                if piece.file == file:
                    yield _stream(tensors[name][kind], piece)


def _stream(tensor: FlatTensor, piece: Range) -> StreamedTensor:
    width = max(CHUNK_BYTES // tensor.dtype.itemsize, 1)

    def pieces() -> Iterable[Tensor]:
        for start in range(piece.start, piece.stop, width):
            yield tensor.read(start, min(start + width, piece.stop))

    return StreamedTensor(piece.key, tensor.dtype, (piece.stop - piece.start,), pieces)
