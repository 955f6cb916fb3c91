"""Is a checkpoint whole? Every file's size and checksum, and an index whose ranges are all there, once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from moe_lvlm.checkpoint.files import hash_file
from moe_lvlm.checkpoint.folder import Log, list_checkpoints, read_latest, tidy
from moe_lvlm.checkpoint.layout import (
    CONFIG_FILE,
    DTYPE_NAMES,
    INDEX_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointError,
    Index,
    check_format,
    is_data_file,
    read_json,
)
from moe_lvlm.checkpoint.reader import Checkpoint


def verify(path: Path, *, is_finite_checked: bool = False) -> list[str]:
    """What is wrong with a checkpoint folder, one sentence each; an empty list if nothing is.

    is_finite_checked: also read all floating-point values and report those tensors that hold NaN or infinity.
    """
    path = Path(path)
    if not path.is_dir():
        return [f"{path}: no such folder"]
    try:
        problems = list(_file_problems(path, _read_manifest(path)))
        if not problems:
            problems = list(_index_problems(path))
        if not problems and is_finite_checked:
            problems = list(_value_problems(path))
    except (CheckpointError, OSError) as error:
        return [str(error)]
    return problems


def newest_valid(directory: Path, log: Log) -> Path | None:
    """The checkpoint to go on from: the one that `latest` names, else the newest older one that is whole.

    A damaged one is named through `log`, with what is wrong with it, and passed over. None if there is none left.
    For one process; the others wait for its answer.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    tidy(directory, log)
    candidates = list_checkpoints(directory)
    latest = read_latest(directory)
    if latest is not None:
        candidates.sort(key=lambda path: path.name != latest)  # stable: the others stay newest first
        if not candidates or candidates[0].name != latest:
            log(f"{directory / latest}: named by `latest`, but not there or without {MANIFEST_FILE}")
    for path in candidates:
        problems = verify(path)
        if not problems:
            return path
        log(f"{path}: damaged, passed over: {'; '.join(problems[:3])}")
    return None


def _read_manifest(path: Path) -> Mapping[str, Any]:
    where = path / MANIFEST_FILE
    data = read_json(where)
    check_format(data, where)
    files = data.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{where}: has no files")
    for name, record in files.items():
        if not is_data_file(name):
            raise CheckpointError(f"{where}: names {name!r}, allowed are a checkpoint's own files")
        if not isinstance(record, dict) or set(record) != {"size", "xxh3_128"}:
            raise CheckpointError(f"{where}: {name}: {record!r}, allowed is an object with size and xxh3_128")
    if missing := {CONFIG_FILE, STATE_FILE, INDEX_FILE} - set(files):
        raise CheckpointError(f"{where}: does not name {', '.join(sorted(missing))}")
    return files


def _file_problems(path: Path, files: Mapping[str, Any]) -> Iterator[str]:
    for name, record in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            yield f"{file}: missing"
        elif (size := file.stat().st_size) != record["size"]:
            yield f"{file}: {size} bytes, {MANIFEST_FILE} says {record['size']}"
        elif (found := hash_file(file).xxh3_128) != record["xxh3_128"]:
            yield f"{file}: xxh3-128 is {found}, {MANIFEST_FILE} says {record['xxh3_128']}"


def _index_problems(path: Path) -> Iterator[str]:
    where = path / INDEX_FILE
    index = Index.from_json(read_json(where), where)
    yield from index.problems()
    headers = {}
    for file in sorted(index.files()):
        try:
            with safetensors.safe_open(path / file, framework="pt") as opened:
                headers[file] = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            yield f"{path / file}: {error}"
            return
    for name, kinds in index.tensors.items():
        for kind, entry in kinds.items():
            for piece in entry.ranges:
                stored = headers[piece.file].get(piece.key)
                expected = (DTYPE_NAMES[entry.dtype], piece.stop - piece.start)
                found = None if stored is None else (stored.get_dtype(), math.prod(stored.get_shape()))
                if found != expected:
                    yield f"{path / piece.file}: {piece.key} is {found}, {name} ({kind}) needs {expected}"


def _value_problems(path: Path) -> Iterator[str]:
    checkpoint = Checkpoint(path)
    for name, kinds in checkpoint.index.tensors.items():
        for kind, entry in kinds.items():
            if not entry.dtype.is_floating_point:
                continue
            for piece in entry.ranges:
                if not checkpoint.read(name, kind, piece.start, piece.stop).isfinite().all():
                    yield f"{path / piece.file}: {name} ({kind}) holds values that are not finite"
