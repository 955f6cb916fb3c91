"""Is a checkpoint whole? Every file's size and checksum, and an index whose ranges are all there, once."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from torch import Tensor

from moe_lvlm.checkpoint.base import read_base
from moe_lvlm.checkpoint.files import CHUNK_BYTES, Advance, hash_file
from moe_lvlm.checkpoint.folder import Log, list_checkpoints, read_latest, tidy
from moe_lvlm.checkpoint.layout import (
    BASE_FILE,
    CONFIG_FILE,
    DTYPE_NAMES,
    FORMAT_VERSIONS,
    INDEX_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointError,
    Index,
    Kind,
    Range,
    check_format,
    is_data_file,
    read_json,
)
from moe_lvlm.checkpoint.reader import Checkpoint

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def verify(
    path: Path,
    *,
    is_finite_checked: bool = False,
    is_hashed: bool = True,
    is_base_checked: bool = True,
    advance: Advance = lambda num_bytes: None,
) -> list[str]:
    """What is wrong with a checkpoint folder, one sentence each; an empty list if nothing is.

    is_finite_checked: also read all floating-point values and report those tensors that hold NaN or infinity.
    is_hashed: False compares the files' sizes only, not their checksums. is_base_checked: also look at the folders that
    hold what the checkpoint leaves out, whose files then are hashed as the checkpoint's own. advance: told of the bytes read, each pass
    over a file for itself; called from several threads.
    """
    path = Path(path)
    if not path.is_dir():
        return [f"{path}: no such folder"]
    try:
        files = read_manifest(path)
        problems = file_problems(path, files, is_hashed=is_hashed, advance=advance) + _unlisted(path, files)
        if not problems:
            problems = list(_index_problems(path, files))
        if not problems and is_base_checked and (base := read_base(path)) is not None:
            problems = base.problems(is_hashed=is_hashed, advance=advance)
        if not problems and is_finite_checked:
            problems = value_problems(path, advance=advance)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    return problems


def newest_valid(directory: Path, log: Log, *, is_owner: bool = False) -> Path | None:
    """The checkpoint to go on from: the one that `latest` names, else the newest older one that is whole.

    A damaged one is named through `log`, with what is wrong with it, and passed over. None if there is none left.
    For one process; the others wait for its answer. is_owner: no other process writes here, so what a killed one left
    half done is removed first; a reader leaves it alone, since it may be a save under way.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    if is_owner:
        tidy(directory, log)
    candidates = list_checkpoints(directory)
    latest = read_latest(directory)
    if latest is not None:
        candidates.sort(key=lambda path: path.name != latest)  # stable: the others stay newest first
        if not candidates or candidates[0].name != latest:
            log(f"{directory / latest}: named by `latest`, but not there or without {MANIFEST_FILE}")
    for path in candidates:
        # whoever opens it is told if its base has gone: to pass over every checkpoint would be to train anew
        problems = verify(path, is_base_checked=False)
        if not problems:
            return path
        log(f"{path}: damaged, passed over: {'; '.join(problems[:3])}")
    return None


def read_manifest(path: Path) -> Mapping[str, Any]:
    """The files that a checkpoint's manifest names: name -> {"size", "xxh3_128"}. Raises CheckpointError."""
    where = path / MANIFEST_FILE
    files = read_records(where)
    for name in files:
        if not is_data_file(name):
            raise CheckpointError(f"{where}: names {name!r}, allowed are a checkpoint's own files")
    if missing := {CONFIG_FILE, STATE_FILE, INDEX_FILE} - set(files):
        raise CheckpointError(f"{where}: does not name {', '.join(sorted(missing))}")
    return files


def read_records(where: Path) -> Mapping[str, Any]:
    """What `documents.write_manifest` wrote, of whatever files. Raises CheckpointError on anything else."""
    data = read_json(where)
    check_format(data, where, allowed=FORMAT_VERSIONS)
    files = data.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{where}: has no files")
    for name, record in files.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{where}: names {name!r}, allowed are files of the same folder")
        if not isinstance(record, dict) or set(record) != {"size", "xxh3_128"}:
            raise CheckpointError(f"{where}: {name}: {record!r}, allowed is an object with size and xxh3_128")
    return files


def file_problems(
    path: Path,
    files: Mapping[str, Any],
    *,
    is_hashed: bool = True,
    advance: Advance = lambda num_bytes: None,
    num_threads: int | None = None,
    where: str = MANIFEST_FILE,
) -> list[str]:
    """Files that are missing, or have another size or checksum than recorded, in the order of the records.

    num_threads: how many files are read at once; None: as many as there are processors, at most 8. where: the file
    that has the records.
    """

    def problem(name: str, advance: Advance) -> str | None:
        file, record = path / name, files[name]
        if file.is_symlink() or not file.is_file():
            return f"{file}: missing"
        if (size := file.stat().st_size) != record["size"]:
            return f"{file}: {size} bytes, {where} says {record['size']}"
        if not is_hashed:
            return None
        try:
            found = hash_file(file, advance=advance).xxh3_128
        except OSError as error:
            return f"{file}: cannot be read: {error.strerror}"
        return (
            None if found == record["xxh3_128"] else f"{file}: xxh3-128 is {found}, {where} says {record['xxh3_128']}"
        )

    found = in_threads(problem, list(files), advance=advance, num_threads=num_threads)
    return [one for one in found if one is not None]


def in_threads(
    work: Callable[[_Item, Advance], _Result],
    items: Sequence[_Item],
    *,
    advance: Advance,
    num_threads: int | None = None,
) -> list[_Result]:
    """What `work` gives for each item, in their order. If one raises, the others end at their next advance."""
    count = min(len(items), num_threads or min(os.cpu_count() or 1, 8))
    if count <= 1:
        return [work(item, advance) for item in items]
    is_over = threading.Event()

    def go_on(num_bytes: int) -> None:
        if is_over.is_set():
            raise RuntimeError("another thread has ended the work")
        advance(num_bytes)

    with ThreadPoolExecutor(max_workers=count, thread_name_prefix="verify") as pool:
        try:
            return list(pool.map(lambda item: work(item, go_on), items))
        except BaseException:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _unlisted(path: Path, files: Mapping[str, Any]) -> list[str]:
    """Files of ours that the manifest does not name: nothing says what they should hold."""
    names = sorted(entry.name for entry in path.iterdir())
    return [
        f"{path / name}: not named by {MANIFEST_FILE}"
        for name in names
        if is_data_file(name) and name not in files and name != MANIFEST_FILE
    ]


def _index_problems(path: Path, files: Mapping[str, Any]) -> Iterator[str]:
    where = path / INDEX_FILE
    index = Index.from_json(read_json(where), where)
    yield from index.problems()
    base = read_base(path)
    if base is not None and (twice := sorted(base.tensors.keys() & index.tensors.keys())):
        yield f"{where}: names {', '.join(twice[:5])}, {BASE_FILE} does too"
    if unknown := sorted(index.files() - set(files)):
        yield f"{where}: names {', '.join(unknown[:5])}, {MANIFEST_FILE} does not"
        return
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


def value_problems(path: Path, *, advance: Advance = lambda num_bytes: None) -> list[str]:
    """The tensors of a checkpoint that hold NaN or infinity, in the order of the index."""
    checkpoint = Checkpoint(path)

    def problem(one: tuple[str, Kind, Range], advance: Advance) -> str | None:
        name, kind, piece = one
        is_good = are_finite(lambda start, stop: checkpoint.view(name, kind, start, stop), piece, advance)
        return None if is_good else f"{path / piece.file}: {name} ({kind}) holds values that are not finite"

    floating = [
        (name, kind, piece)
        for name, kinds in checkpoint.index.tensors.items()
        for kind, entry in kinds.items()
        if entry.dtype.is_floating_point
        for piece in entry.ranges
    ]
    checkpoint.open_files()  # the threads must not open the same file twice
    return [one for one in in_threads(problem, floating, advance=advance) if one is not None]


def are_finite(
    read: Callable[[int, int], Tensor], piece: Range, advance: Advance, row_shape: tuple[int, ...] = ()
) -> bool:
    """Whether all rows of a range are finite; read a chunk at a time. row_shape: of what `read` counts."""
    width = max(CHUNK_BYTES // (8 * max(math.prod(row_shape), 1)), 1)
    for start in range(piece.start, piece.stop, width):
        values = read(start, min(start + width, piece.stop))
        # A sum that is finite has finite terms only, and takes no memory; one that is not may have overflowed.
        if not values.sum().isfinite() and not values.isfinite().all():
            return False
        advance(values.nbytes)
    return True
