"""Files that survive a crash: written, hashed and fsynced; and a safetensors writer that streams.

The writer is ours because `safetensors.torch.save_file` wants every tensor in host memory at once and hides the
operating system's error (ENOSPC). The format: 8 bytes of header length (little endian), a JSON header, the data.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from torch import Tensor

from moe_lvlm.checkpoint.layout import DTYPE_NAMES

CHUNK_BYTES = 4 * 2**20  # read and written at once: more is not faster, and fits no cache
Advance = Callable[[int], None]  # told of every so many bytes that were written or read


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size in bytes and its xxh3-128, in hexadecimal."""

    size: int
    xxh3_128: str


Close = Callable[[BinaryIO], None]  # brings a flushed file to the disk and closes it


def close_synced(file: BinaryIO) -> None:
    """Close a flushed file once it is on the disk."""
    try:
        os.fsync(file.fileno())
    finally:
        file.close()


class SyncThread:
    """Brings files to the disk one after the other, while the next one is written.

    A context: at its end all of them are there, or the first error is raised.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sync")
        self._closing: list[Future[None]] = []

    def close(self, file: BinaryIO) -> None:
        """As `close_synced`, by and by."""
        self._closing.append(self._thread.submit(close_synced, file))

    def __enter__(self) -> SyncThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            for closing in self._closing:
                closing.result()


class HashedFile:
    """A new file that counts and hashes what is written to it, and is on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self._hash = xxhash.xxh3_128()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def close(self, close: Close = close_synced) -> FileRecord:
        """Flush to the disk and close, or leave both to `close`."""
        self._file.flush()
        close(self._file)
        return FileRecord(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close without a promise: the write failed."""
        # closing flushes what is buffered, which fails again on a full disk: the first error is the one to report
        try:
            self._file.close()
        except OSError:
            return


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """A new file with this content, on the disk when this returns."""
    file = HashedFile(path)
    try:
        file.write(data)
        return file.close()
    except BaseException:
        file.abandon()
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> FileRecord:
    """A new JSON file. Raises ValueError on what JSON has no word for, NaN included."""
    return write_bytes(path, json.dumps(data, indent=1, allow_nan=False).encode())


class StreamedTensor(NamedTuple):
    """A tensor that is made while it is written. pieces: the consecutive parts of its flattened elements, in order."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(key: str, tensor: Tensor) -> StreamedTensor:
        """A tensor that is there, of any device."""
        return StreamedTensor(key, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))


def write_safetensors(
    path: Path,
    tensors: Sequence[StreamedTensor],
    *,
    metadata: Mapping[str, str] | None = None,
    advance: Advance = lambda num_bytes: None,
    close: Close = close_synced,
) -> FileRecord:
    """A new safetensors file with these tensors, in this order; one piece at a time is in host memory.

    close: how the file comes to the disk; it is there when this returns, unless that is left to a `SyncThread`.

    Raises:
        ValueError: a tensor's pieces are of another dtype, or more or fewer elements, than it says.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        stop = offset + tensor.num_bytes
        header[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes

    file = HashedFile(path)
    try:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            _write_tensor(file, tensor, advance)
        return file.close(close)
    except BaseException:
        file.abandon()
        raise


def _write_tensor(file: HashedFile, tensor: StreamedTensor, advance: Advance) -> None:
    left = math.prod(tensor.shape)
    for piece in tensor.pieces():
        left -= piece.numel()
        if piece.dtype != tensor.dtype or left < 0:
            raise ValueError(f"{tensor.key}: a piece of {piece.numel()} x {piece.dtype} does not fit {tensor[1:3]}")
        data = piece.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        for chunk in data.split(CHUNK_BYTES):
            file.write(chunk.numpy().data)
            advance(chunk.numel())
    if left:
        raise ValueError(f"{tensor.key}: {left} elements are missing")


def hash_file(path: Path, *, advance: Advance = lambda num_bytes: None) -> FileRecord:
    """Size and hash of a file as it is on the disk. advance: told of the bytes read; what it raises ends the reading."""
    digest = xxhash.xxh3_128()
    size = 0
    buffer = memoryview(bytearray(min(CHUNK_BYTES, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            advance(count)
    return FileRecord(size, digest.hexdigest())


def fsync_folder(path: Path) -> None:
    """Make the folder's entries (creations, renames) survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Give a small file a new content atomically: readers see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    write_bytes(temporary, text.encode())
    temporary.replace(path)
    fsync_folder(path.parent)


def replace_folder(temporary: Path, target: Path) -> None:
    """Give a finished folder its name, atomically; what had the name before goes once the new one has it."""
    aside = target.with_name(f".{target.name}.old")
    if target.exists():
        if aside.exists():  # a process was killed after it had replaced it, and before it could remove it
            shutil.rmtree(aside)
        target.rename(aside)
    temporary.rename(target)
    fsync_folder(target.parent)
    if aside.exists():
        shutil.rmtree(aside)


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged process may still write at this path."""
    return shutil.disk_usage(path).free


def require_free_bytes(directory: Path, needed: int) -> None:
    """Raises OSError unless `needed` bytes can still be written at this path."""
    if (free := free_bytes(directory)) < needed:
        raise OSError(f"{directory}: {free:,} bytes free, {needed:,} needed")
