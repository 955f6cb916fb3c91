"""Writing a checkpoint that is not in training: out of another one, or out of another format. One process.

Tensors are read flat, a piece at a time, while they are written: memory stays at one piece, whatever the model's size.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lvlm.checkpoint import layout
from moe_lvlm.checkpoint.base import Base
from moe_lvlm.checkpoint.documents import SLACK_BYTES, write_documents
from moe_lvlm.checkpoint.files import (
    CHUNK_BYTES,
    Advance,
    FileRecord,
    StreamedTensor,
    SyncThread,
    replace_folder,
    require_free_bytes,
    write_safetensors,
)
from moe_lvlm.checkpoint.folder import Log, global_step, publish, read_latest, temporary_path
from moe_lvlm.checkpoint.layout import LATEST_FILE, Entry, Index, Kind, Range, check_name, is_data_file
from moe_lvlm.checkpoint.save import SaveReport

WHOLE_BYTES = 2**20  # a smaller tensor is not divided between two files


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
    base: Base | None = None,
    num_files: int = 1,
    is_overwriting: bool = True,
    before_publishing: Callable[[], None] = lambda: None,
    log: Log = lambda line: None,
    advance: Advance = lambda num_bytes: None,
) -> SaveReport:
    """Write `directory`/`name`, as atomically as a save in training. For one process that has the folder to itself.

    It becomes the latest, unless that is one of a later step, or training could not go on from this one.

    config: the model's configuration. state: all of state.json but its format version. rng: the generators of each
    rank that saved. base: where the weights are that are left out. num_files: among how many files the tensors go, by bytes; parts of a tensor may lie in two files.
    before_publishing: called when everything is written; what it raises undoes the writing. log: told if it is not the
    latest. advance: told of the bytes written, out of `total_bytes`.

    Raises:
        ValueError: the checkpoint exists and may not be replaced; or its place holds something else.
        OSError: the disk is full, or fails; nothing is left behind then.
    """
    started = time.monotonic()
    directory = Path(directory)
    check_target(directory / check_name(name), is_overwriting=is_overwriting)
    index = plan_files(tensors, num_files)
    temporary = temporary_path(directory, name)
    directory.mkdir(parents=True, exist_ok=True)
    require_free_bytes(directory, total_bytes(tensors) + SLACK_BYTES)
    if temporary.exists():  # a process was killed while writing it
        _check_ours(temporary)
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        records: dict[str, FileRecord] = {}
        with SyncThread() as sync:
            for file, streams in _streams(tensors, index).items():
                records[file] = write_safetensors(temporary / file, streams, advance=advance, close=sync.close)
        for rank, generators in enumerate(rng):
            few = [StreamedTensor.of(key, tensor) for key, tensor in generators.items()]
            records[layout.rng_file(rank)] = write_safetensors(temporary / layout.rng_file(rank), few)
        size = write_documents(temporary, records, index=index, config=config, state=state, base=base)
        before_publishing()
        _publish(directory, name, can_go_on=bool(state.get(layout.HAS_OPTIMIZER, True)), log=log)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # what stays is removed by the next save
        raise
    return SaveReport(directory / name, size, time.monotonic() - started)


def check_target(target: Path, *, is_overwriting: bool) -> None:
    """ValueError if a checkpoint must not be written there."""
    if not target.exists() and not target.is_symlink():
        return
    if not is_overwriting:
        raise ValueError(f"{target}: exists already; choose another name, or allow overwriting (--overwrite)")
    _check_ours(target)


def _check_ours(folder: Path) -> None:
    """ValueError unless a folder holds files of a checkpoint and nothing else, so that it may be removed."""
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder, and is not replaced")
    if foreign := sorted(entry.name for entry in folder.iterdir() if not is_data_file(entry.name)):
        raise ValueError(f"{folder}: holds {foreign[0]!r}, which no checkpoint does, and is not replaced")


def _publish(directory: Path, name: str, *, can_go_on: bool, log: Log) -> None:
    """Give the finished folder its name; the latest it becomes unless training would lose by it."""
    latest, temporary = read_latest(directory), temporary_path(directory, name)
    if latest in (None, name) or (can_go_on and global_step(directory / str(latest)) <= global_step(temporary)):
        publish(directory, name)
    else:
        replace_folder(temporary, directory / name)
        log(f"{directory / LATEST_FILE}: names {latest} as before, from which training goes on")


def plan_files(tensors: FlatTensors, num_files: int) -> Index:
    """Where each range goes: files of nearly equal size, the tensors one after the other.

    A file takes its share of all bytes; a tensor below `WHOLE_BYTES` goes whole to the file in which it begins.
    """
    if num_files < 1:
        raise ValueError(f"number of files: {num_files}; allowed: 1 and above")
    share = max(-(-total_bytes(tensors) // num_files), 1)
    planned: dict[str, dict[Kind, Entry]] = {}
    offset = 0
    for name, kinds in tensors.items():
        for kind, tensor in kinds.items():
            ranges = []
            for start, stop in pairwise(_edges(tensor, offset, share)):
                # the last file also takes empty tensors that come after all bytes
                file = layout.rank_file(min((offset + start * tensor.dtype.itemsize) // share, num_files - 1))
                ranges.append(Range(start, stop, file, f"{name}:{kind}:{start}"))
            planned.setdefault(name, {})[kind] = Entry(
                dtype=tensor.dtype, shape=tensor.shape, ranges=tuple(ranges), step=tensor.step
            )
            offset += tensor.num_bytes
    return Index(planned)


def file_bytes(index: Index) -> dict[str, int]:
    """Bytes of tensors in each file of an index, by name."""
    sizes: dict[str, int] = {}
    for kinds in index.tensors.values():
        for entry in kinds.values():
            for piece in entry.ranges:
                sizes[piece.file] = sizes.get(piece.file, 0) + (piece.stop - piece.start) * entry.dtype.itemsize
    return dict(sorted(sizes.items()))


def _edges(tensor: FlatTensor, offset: int, share: int) -> list[int]:
    """Elements at which a tensor that begins at byte `offset` of all passes from one file to the next."""
    edges = [0]
    if tensor.num_bytes >= WHOLE_BYTES:
        for boundary in range((offset // share + 1) * share, offset + tensor.num_bytes, share):
            edge = -(-(boundary - offset) // tensor.dtype.itemsize)
            if edges[-1] < edge < tensor.numel:
                edges.append(edge)
    return [*edges, tensor.numel]


def _streams(tensors: FlatTensors, index: Index) -> dict[str, list[StreamedTensor]]:
    """What each file holds, in the order of the tensors; one file at least."""
    streams: dict[str, list[StreamedTensor]] = {}
    for name, kinds in index.tensors.items():
        for kind, entry in kinds.items():
            for piece in entry.ranges:
                streams.setdefault(piece.file, []).append(_stream(tensors[name][kind], piece))
    return streams or {layout.rank_file(0): []}


def _stream(tensor: FlatTensor, piece: Range) -> StreamedTensor:
    width = max(CHUNK_BYTES // tensor.dtype.itemsize, 1)

    def pieces() -> Iterable[Tensor]:
        for start in range(piece.start, piece.stop, width):
            yield tensor.read(start, min(start + width, piece.stop))

    return StreamedTensor(piece.key, tensor.dtype, (piece.stop - piece.start,), pieces)
