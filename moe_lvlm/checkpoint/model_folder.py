"""A model folder in Hugging Face's layout: safetensors shards with their index, and small files beside them.

Written from a `WeightSource` a few rows at a time, to a temporary folder that then gets the name. `checksums.json`
holds size and xxh3-128 of each file, so that `verify` can judge the folder; other programs take no notice of it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from torch import Tensor

from moe_lvlm.checkpoint.documents import SLACK_BYTES, write_manifest
from moe_lvlm.checkpoint.files import (
    CHUNK_BYTES,
    Advance,
    FileRecord,
    StreamedTensor,
    SyncThread,
    replace_folder,
    require_free_bytes,
    write_bytes,
    write_safetensors,
)
from moe_lvlm.checkpoint.source import SAFETENSORS_INDEX, WeightSource

CHECKSUMS_FILE = "checksums.json"
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Shards:
    """Which tensors go into which file, in order; bytes of all tensors."""

    names_of: Mapping[str, tuple[str, ...]]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WrittenFolder:
    """What was written: the folder, the bytes of all its files, and the time it took."""

    path: Path
    bytes: int
    seconds: float


def plan_shards(source: WeightSource, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Shards:
    """Divide a source's tensors among files named as Hugging Face names them. A larger tensor gets a file of its own."""
    if max_shard_bytes < 1:
        raise ValueError(f"shard size: {max_shard_bytes} bytes; allowed: 1 and above")
    sizes = {name: tensor_bytes(source, name) for name in source.names()}
    split = split_state_dict_into_shards_factory(
        sizes,  # of anything that the two functions know how to measure
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    return Shards(
        {file: tuple(names) for file, names in split.filename_to_tensors.items()}, num_bytes=sum(sizes.values())
    )


def tensor_bytes(source: WeightSource, name: str) -> int:
    """Bytes of all elements of one tensor."""
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def write_model_folder(
    target: Path,
    source: WeightSource,
    *,
    documents: Mapping[str, bytes],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    is_overwriting: bool = False,
    advance: Advance = lambda num_bytes: None,
) -> WrittenFolder:
    """Write weights and documents (config.json, tokenizer files, model card, ...: content by name) as a folder.

    max_shard_bytes: the most that a file of weights holds, unless a single tensor is larger. is_overwriting: whether
    an existing model folder may be replaced. advance: told of the bytes written, out of `plan_shards(...).num_bytes`.

    Raises:
        ValueError: the target exists, and may not be replaced or is no model folder; or a document's name is a path.
        OSError: the disk is full, or fails; nothing is left behind then.
    """
    started = time.monotonic()
    target = Path(target).absolute()
    check_target(target, is_overwriting=is_overwriting)
    for name in documents:
        if Path(name).name != name or name in ("", ".", "..") or name.endswith(".safetensors"):
            raise ValueError(f"document {name!r}; allowed: the name of a file that holds no weights")
    shards = plan_shards(source, max_shard_bytes=max_shard_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    require_free_bytes(target.parent, shards.num_bytes + sum(map(len, documents.values())) + SLACK_BYTES)

    temporary = target.with_name(f".{target.name}.partial")
    if temporary.exists():  # a process was killed while writing it
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        records = _write_files(temporary, source, shards, documents, advance)
        manifest = write_manifest(temporary / CHECKSUMS_FILE, records)
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    size = manifest.size + sum(record.size for record in records.values())
    return WrittenFolder(target, size, time.monotonic() - started)


def check_target(target: Path, *, is_overwriting: bool) -> None:
    """ValueError if a model folder must not be written there."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_overwriting:
        raise ValueError(f"{target}: exists already; choose another folder, or allow overwriting (--overwrite)")
    if not (target / CHECKSUMS_FILE).is_file():
        raise ValueError(f"{target}: exists and was not written by this program ({CHECKSUMS_FILE} is missing)")


def _write_files(
    folder: Path, source: WeightSource, shards: Shards, documents: Mapping[str, bytes], advance: Advance
) -> dict[str, FileRecord]:
    records = {}
    with SyncThread() as sync:
        for file, names in shards.names_of.items():
            streams = [_stream(source, name) for name in names]
            records[file] = write_safetensors(
                folder / file, streams, metadata={"format": "pt"}, advance=advance, close=sync.close
            )
    if len(shards.names_of) > 1:
        weight_map = {name: file for file, names in shards.names_of.items() for name in names}
        index = {"metadata": {"total_size": shards.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        documents = {**documents, SAFETENSORS_INDEX: json.dumps(index, indent=2).encode()}
    for name, content in documents.items():
        records[name] = write_bytes(folder / name, content)
    return records


def _stream(source: WeightSource, name: str) -> StreamedTensor:
    shape, dtype = source.shape(name), source.dtype(name)

    def pieces() -> Iterable[Tensor]:
        if not shape:
            yield source.read(name)
            return
        row_bytes = max(math.prod(shape[1:]) * dtype.itemsize, 1)
        step = max(CHUNK_BYTES // row_bytes, 1)
        for start in range(0, shape[0], step):
            yield source.read(name, start, min(start + step, shape[0]))

    return StreamedTensor(name, dtype, shape, pieces)


def as_dtype(name: str) -> torch.dtype:
    """The type of that name (`float32`, `bfloat16`, `float16`). Raises ValueError on any other."""
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in allowed:
        raise ValueError(f"dtype: {name!r}; allowed: {', '.join(allowed)}")
    return allowed[name]
