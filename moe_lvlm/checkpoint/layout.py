"""What a checkpoint folder holds: file names, the index of logical tensors, and the manifest of files.

    config.json             the model's configuration
    state.json              where training stands (stage, steps, samples, topology at the time of saving, ...)
    index.json              logical tensor -> kind -> dtype, shape, and flat ranges with file and key
    rank-00000.safetensors  the flat ranges that rank 0 owned, and so on
    rng-00000.safetensors   rank 0's random number generators, and so on
    base.json               only where weights are left out: which, and the folders that hold them (`base`)
    manifest.json           size and xxh3-128 of each of the others; a folder without it is no checkpoint

A flat range [start, stop) counts elements of the row-major flattened *logical* tensor: an expert weight is
[E, F, D] over all experts, whatever the expert-parallel size was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch

FORMAT_VERSION = 1
FORMAT_WITH_BASE = 2  # of state, manifest and base where weights are left out: a program that knows no base must refuse
FORMAT_VERSIONS = (FORMAT_VERSION, FORMAT_WITH_BASE)
CONFIG_FILE = "config.json"
STATE_FILE = "state.json"
INDEX_FILE = "index.json"
MANIFEST_FILE = "manifest.json"
BASE_FILE = "base.json"
LATEST_FILE = "latest"
HAS_OPTIMIZER = "has_optimizer"  # key of state.json: whether training can go on; absent means true

Kind = Literal["weight", "master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")

# safetensors' names for the element types that parameters, moments and buffers come in
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
_DATA_FILE = re.compile(r"(rank|rng)-\d{5,}\.safetensors|(config|state|index|base|manifest)\.json")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as asked. The message names the file, what is wrong and what is allowed."""


def rank_file(rank: int) -> str:
    """Name of the file with the ranges that a rank owned."""
    return f"rank-{rank:05d}.safetensors"


def rng_file(rank: int) -> str:
    """Name of the file with a rank's random number generators."""
    return f"rng-{rank:05d}.safetensors"


def check_name(name: str) -> str:
    """The name itself if it can be a checkpoint folder's, else ValueError: no separators, no leading dot."""
    if not _NAME.fullmatch(name) or name == LATEST_FILE:
        raise ValueError(
            f"checkpoint name {name!r}: allowed are letters, digits, '.', '_' and '-', not {LATEST_FILE!r}"
        )
    return name


def is_data_file(name: str) -> bool:
    """Whether a file of this name belongs to a checkpoint folder."""
    return _DATA_FILE.fullmatch(name) is not None


def is_rank_file(name: str) -> bool:
    """Whether a file of this name holds ranges of tensors."""
    return _RANK_FILE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Range:
    """Elements [start, stop) of a flattened logical tensor, stored as the 1-D tensor `key` of `file`."""

    start: int
    stop: int
    file: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One kind of one logical tensor. step: the optimizer's count of steps, with moments only."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    ranges: tuple[Range, ...]
    step: float | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Index:
    """All logical tensors of a checkpoint: name -> kind -> entry."""

    tensors: Mapping[str, Mapping[Kind, Entry]]

    def problems(self) -> list[str]:
        """Holes and overlaps: each entry's ranges must cover [0, numel) exactly once."""
        return [
            f"{INDEX_FILE}: {name} ({kind}): {problem}"
            for name, kinds in self.tensors.items()
            for kind, entry in kinds.items()
            for problem in _coverage_problems(entry)
        ]

    def files(self) -> set[str]:
        """The names of the files that hold ranges."""
        return {piece.file for kinds in self.tensors.values() for entry in kinds.values() for piece in entry.ranges}

    def to_json(self) -> dict[str, Any]:
        """Plain data for index.json."""
        return {
            "format_version": FORMAT_VERSION,
            "tensors": {
                name: {kind: _entry_to_json(entry) for kind, entry in kinds.items()}
                for name, kinds in sorted(self.tensors.items())
            },
        }

    @staticmethod
    def from_json(data: Any, where: Path) -> Index:
        """Inverse of `to_json`. Raises CheckpointError on anything that does not have its form."""
        check_format(data, where)
        try:
            return Index(
                {
                    str(name): {_kind(kind): _entry_from_json(entry) for kind, entry in kinds.items()}
                    for name, kinds in data["tensors"].items()
                }
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{where}: not an index of ours: {type(error).__name__}: {error}") from error


def check_format(data: Any, where: Path, *, allowed: tuple[int, ...] = (FORMAT_VERSION,)) -> None:
    """Raise CheckpointError unless `data` is an object of a version of this format that is allowed."""
    version = data.get("format_version") if isinstance(data, dict) else None
    if version not in allowed:
        raise CheckpointError(
            f"{where}: format_version is {version!r}, this program reads {' and '.join(map(str, allowed))}"
        )


def read_json(path: Path) -> Any:
    """The file's content. Raises CheckpointError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file; a checkpoint folder has {INDEX_FILE}, {MANIFEST_FILE}, ..."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def _coverage_problems(entry: Entry) -> Iterable[str]:
    for piece in entry.ranges:
        if not 0 <= piece.start <= piece.stop <= entry.numel:
            yield f"range [{piece.start}, {piece.stop}) outside of {entry.numel} elements"
    edges = [(0, 0), *sorted((piece.start, piece.stop) for piece in entry.ranges), (entry.numel, entry.numel)]
    for (_, stop), (start, _) in pairwise(edges):
        if start > stop:
            yield f"no file has [{stop}, {start})"
        elif start < stop:
            yield f"more than one file has [{start}, {stop})"


def _kind(kind: str) -> Kind:
    for known in KINDS:
        if kind == known:
            return known
    raise ValueError(f"kind {kind!r}, allowed are {', '.join(KINDS)}")


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    data: dict[str, Any] = {
        "dtype": DTYPE_NAMES[entry.dtype],
        "shape": list(entry.shape),
        "ranges": [[piece.start, piece.stop, piece.file, piece.key] for piece in entry.ranges],
    }
    return data if entry.step is None else {**data, "step": entry.step}


def _entry_from_json(data: Mapping[str, Any]) -> Entry:
    ranges = []
    for start, stop, file, key in data["ranges"]:
        # the only names that we write: no separator gets in, so no range can point out of the folder
        if not isinstance(file, str) or not _RANK_FILE.fullmatch(file):
            raise ValueError(f"file {file!r}, allowed are names like {rank_file(0)} in the same folder")
        ranges.append(Range(int(start), int(stop), file, str(key)))
    step = data.get("step")
    shape = tuple(int(size) for size in data["shape"])
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}, sizes must not be negative")
    return Entry(
        dtype=DTYPES[data["dtype"]],
        shape=shape,
        ranges=tuple(sorted(ranges, key=lambda piece: piece.start)),
        step=None if step is None else float(step),
    )
