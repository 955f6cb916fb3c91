"""Features of a frozen vision tower on disk, which a run with `data.feature_cache` reads in the place of images.

A folder holds shards (`feature_shards`) and index.json, which says whose features lie where. An image is known by its
path below the recipe's `data.image_root`, so that folder and images can move together.

M features of an image   C their width
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lvlm.data.errors import DataFileError, RecordFault
from moe_lvlm.data.images import resolve_image

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TENSOR = "features"
MADE_BY = "tools/cache_features.py"
_OPEN_SHARDS = 1024
"""Shards that a process keeps open: each is a mapping in its memory, of which Linux allows 65,530."""

Fingerprint: TypeAlias = Mapping[str, Any]
"""All that features depend on besides the image: plain values, as JSON has them, by a name that a message can say."""


class FeatureCache:
    """The features in one folder. Shards are opened when they are first needed, by each worker for itself.

    folder: with index.json. base: the folder `data.image_root`. fingerprint: of the tower and the image processor that
    the features were made with. shape: (M, C) of each image.

    Raises DataFileError: a folder without an index, an index of another form, a shard that is missing.
    """

    def __init__(self, folder: Path, *, base: Path) -> None:
        self.folder = folder
        self.base = base
        index = _read_index(folder / INDEX_FILE)
        self.fingerprint: Fingerprint = index["fingerprint"]
        self.shape: tuple[int, int] = (index["shape"][0], index["shape"][1])
        self._shards: list[str] = list(index["shards"])
        if missing := [name for name in self._shards if not (folder / name).is_file()]:
            raise DataFileError(
                f"{folder}: {len(missing)} shards of {INDEX_FILE} are missing ({missing[0]}); {MADE_BY} makes them anew"
            )
        images = [image for name in self._shards for image in index["shards"][name]]
        self._rows = {key: row for row, (key, _) in enumerate(images)}  # counted over all shards
        self._sizes = np.array([size for _, size in images], dtype=np.int64)
        self._ends = np.cumsum([len(index["shards"][name]) for name in self._shards], dtype=np.int64)
        self._open: dict[int, Any] = {}  # shard -> slices of its tensor, the oldest first

    def __len__(self) -> int:
        """Images."""
        return len(self._rows)

    def read(self, root: Path, path: str) -> Tensor:
        """The features [M, C] of the image `path` below `root`, in the type in which they are stored.

        Raises RecordFault if the path is not allowed (`resolve_image`), the cache lacks the image, or the file has
        another size than the one whose features it has; DataFileError for a damaged shard.
        """
        size = resolve_image(root, path).stat().st_size
        key = image_key(self.base, root, path)
        row = self._rows.get(key)
        if row is None:
            raise RecordFault(
                f"image {path!r} is not in the feature cache {self.folder} (looked for as {key!r}); {MADE_BY} adds what"
                " is missing and can be read"
            )
        if size != self._sizes[row]:
            raise RecordFault(
                f"image {path!r} has {size} bytes, the one in the feature cache {self.folder} had {self._sizes[row]}: it"
                " is another image; allowed: the one that the features were made of"
            )
        shard = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[shard - 1]) if shard else 0
        # a copy: what comes is a view of the whole shard, which would travel with it between processes
        features: Tensor = self._slices(shard)[row - start].clone()
        return features

    def _slices(self, shard: int) -> Any:
        if shard not in self._open:
            path = self.folder / self._shards[shard]
            start = int(self._ends[shard - 1]) if shard else 0
            expected = [int(self._ends[shard]) - start, *self.shape]
            try:
                slices = safe_open(path, framework="pt").get_slice(TENSOR)
            except (OSError, SafetensorError) as error:
                raise DataFileError(f"{path}: no shard of features ({error}); {MADE_BY} makes it anew") from error
            if slices.get_shape() != expected:
                raise DataFileError(f"{path}: {TENSOR} is {slices.get_shape()}, {INDEX_FILE} says {expected}")
            if len(self._open) >= _OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[shard] = slices
        return self._open[shard]


def image_key(base: Path, root: Path, path: str) -> str:
    """What an image is called in a cache: its path below `base`, or the whole path where it does not lie there by name.
    Links are not followed: a folder of images may be one."""
    joined = root / path
    return (joined.relative_to(base) if joined.is_relative_to(base) else joined).as_posix()


def differences(cached: Fingerprint, here: Fingerprint) -> list[str]:
    """How two fingerprints differ, both values of each difference named; empty if features of one are those of the other."""
    names = sorted({*cached, *here})
    return [
        f"{name} is {cached.get(name)!r} in the cache, {here.get(name)!r} in the recipe"
        for name in names
        if cached.get(name) != here.get(name)
    ]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataFileError(
            f"{path}: no such file; allowed: a folder that {MADE_BY} has finished (the same call goes on with one that"
            " it has begun)"
        ) from error
    except (OSError, ValueError) as error:
        raise DataFileError(f"{path}: cannot be read as JSON ({error}); {MADE_BY} makes it anew") from error
    if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
        found = index.get("format_version") if isinstance(index, dict) else index
        raise DataFileError(f"{path}: format_version {found!r}; allowed: {FORMAT_VERSION}")
    if not _is_index(index):
        raise DataFileError(
            f"{path}: it holds {sorted(index)}; allowed: fingerprint (an object), shape (two whole numbers), shards (file"
            " name -> [path, bytes] of each image)"
        )
    return index


def _is_index(index: dict[str, Any]) -> bool:
    shape, shards = index.get("shape"), index.get("shards")
    return (
        isinstance(index.get("fingerprint"), dict)
        and isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(size, int) and size > 0 for size in shape)
        and isinstance(shards, dict)
        and all(Path(name).name == name and isinstance(images, list) for name, images in shards.items())
        and all(
            isinstance(image, list) and len(image) == 2 and isinstance(image[0], str) and isinstance(image[1], int)
            for images in shards.values()
            for image in images
        )
    )
