"""The writing side of a feature cache: shards that appear whole or not at all, and the index over them.

A shard is a safetensors file with one tensor `features` [I, M, C]; its metadata say whose features they are and what made
them, so that the index can be built from the shards alone, by a call that goes on from one that was killed, or by any of
several that work on parts.

I images   M features of an image   C their width
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lvlm.data.clusters import write_whole
from moe_lvlm.data.errors import DataFileError
from moe_lvlm.data.features import FORMAT_VERSION, INDEX_FILE, TENSOR, Fingerprint, differences

_FACTS = "moe_lvlm_features"
_PATTERN = "features-*.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


class ShardImage(NamedTuple):
    """key: what the image is called (`image_key`). size: bytes of its file."""

    key: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What a shard's header says. shape: (M, C). dtype: a key of `DTYPES`."""

    name: str
    images: tuple[ShardImage, ...]
    shape: tuple[int, int]
    dtype: str
    fingerprint: Fingerprint


def write_shard(folder: Path, images: Sequence[ShardImage], features_IMC: Tensor, *, fingerprint: Fingerprint) -> Shard:
    """Write one shard. Its name follows from its images: two calls that write the same at once do no harm."""
    assert len(images) == len(features_IMC) > 0
    digest = xxhash.xxh3_64_hexdigest(json.dumps(images).encode())
    path = folder / f"features-{digest}.safetensors"
    scratch = folder / f".{path.name}.{os.getpid()}"
    facts = json.dumps({"format_version": FORMAT_VERSION, "fingerprint": dict(fingerprint), "images": images})
    try:
        save_file({TENSOR: features_IMC.contiguous()}, scratch, metadata={_FACTS: facts})
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return read_shard(path)


def read_shard(path: Path) -> Shard:
    """What a shard holds, from its header. Raises DataFileError on a file of another form."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
            slices = file.get_slice(TENSOR)
            num_images, *shape = slices.get_shape()
            images = tuple(ShardImage(str(key), int(size)) for key, size in facts["images"])
            dtype, version, fingerprint = _NAMES[slices.get_dtype()], facts["format_version"], facts["fingerprint"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataFileError(
            f"{path}: no shard of a feature cache ({type(error).__name__}: {error}); remove it, and the same call makes "
            "it anew"
        ) from error
    if version != FORMAT_VERSION or len(shape) != 2 or num_images != len(images):
        raise DataFileError(
            f"{path}: format_version {version!r}, {TENSOR} {[num_images, *shape]} for {len(images)} images; allowed: "
            f"format_version {FORMAT_VERSION} and [images, M, C]"
        )
    return Shard(name=path.name, images=images, shape=(shape[0], shape[1]), dtype=dtype, fingerprint=fingerprint)


def read_shards(folder: Path) -> list[Shard]:
    """All shards of a folder, whose fingerprints, shapes and types agree; none if it is not there.

    Raises DataFileError.
    """
    shards = [read_shard(path) for path in sorted(folder.glob(_PATTERN))]
    for shard in shards[1:]:
        first = shards[0]
        if (shard.shape, shard.dtype) != (first.shape, first.dtype) or shard.fingerprint != first.fingerprint:
            raise DataFileError(
                f"{folder}: {first.name} holds {first.dtype} {first.shape}, {shard.name} {shard.dtype} {shard.shape}; "
                f"{'; '.join(differences(first.fingerprint, shard.fingerprint)) or 'made alike'}; allowed: shards of "
                "one tower, in one type"
            )
    return shards


def clear_leftovers(folder: Path) -> None:
    """Remove what killed calls were writing: no shard takes an hour."""
    for scratch in folder.glob(f".{_PATTERN}.*"):
        if time.time() - scratch.stat().st_mtime > 3600:
            scratch.unlink(missing_ok=True)


def write_index(folder: Path) -> int:
    """Write index.json over all shards that are there; the number of images. Several processes may do so at once: who
    writes last has seen all that was there when it began to write, else it writes once more."""
    while True:
        shards = read_shards(folder)
        if not shards:
            raise DataFileError(f"{folder}: no shard to make an index of; none of the images could be read")
        index: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "fingerprint": dict(shards[0].fingerprint),
            "shape": list(shards[0].shape),
            "dtype": shards[0].dtype,
            "shards": {shard.name: [list(image) for image in shard.images] for shard in shards},
        }
        write_whole(folder / INDEX_FILE, (json.dumps(index, ensure_ascii=False) + "\n").encode())
        if {path.name for path in folder.glob(_PATTERN)} == {shard.name for shard in shards}:
            return len({image.key for shard in shards for image in shard.images})
