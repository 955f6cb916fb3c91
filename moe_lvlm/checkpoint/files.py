"""Files that survive a crash: written, hashed and fsynced; and a safetensors writer that streams.

The writer is ours because `safetensors.torch.save_file` wants every tensor in host memory at once and hides the
operating system's error (ENOSPC). The format: 8 bytes of header length (little endian), a JSON header, the data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from moe_lvlm.checkpoint.layout import DTYPE_NAMES

_CHUNK = 16 * 2**20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size in bytes and its xxh3-128, in hexadecimal."""

    size: int
    xxh3_128: str


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

    def close(self) -> FileRecord:
        """Flush to the disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
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


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> FileRecord:
    """A new safetensors file with these tensors, of any device, in this order; one at a time is copied to the host."""
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in tensors:
        stop = offset + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes

    file = HashedFile(path)
    try:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, tensor in tensors:
            _write_tensor(file, tensor)
        return file.close()
    except BaseException:
        file.abandon()
        raise


def _write_tensor(file: HashedFile, tensor: Tensor) -> None:
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    for chunk in data.split(_CHUNK):
        file.write(chunk.numpy().data)


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file as it is on the disk."""
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
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


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged process may still write at this path."""
    return shutil.disk_usage(path).free
