"""A folder of folders that appears whole or not at all; each of them holds checksums of its own files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from moe_lvlm.checkpoint.documents import write_manifest
from moe_lvlm.checkpoint.files import Advance, StreamedTensor, replace_folder, write_bytes, write_safetensors
from moe_lvlm.checkpoint.model_folder import (
    CHECKSUMS_FILE,
    DEFAULT_SHARD_BYTES,
    WrittenFolder,
    check_target,
    write_model_folder,
)
from moe_lvlm.checkpoint.source import WeightSource

# Path below a folder, with slashes -> content
Documents = Mapping[str, bytes]


@contextmanager
def new_folder(target: Path, *, is_overwriting: bool = False) -> Iterator[Path]:
    """A folder to fill, which gets the name `target` when the block ends, and is gone if it raises.

    Raises:
        ValueError: the target exists, and may not be replaced.
    """
    target = Path(target).absolute()
    check_target(target, is_overwriting=is_overwriting)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    if temporary.exists():  # a process was killed while writing it
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_model_tree(
    target: Path,
    source: WeightSource,
    *,
    documents: Documents,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    is_overwriting: bool = False,
    advance: Advance = lambda num_bytes: None,
) -> WrittenFolder:
    """As `write_model_folder`, with documents in folders below too."""
    started = time.monotonic()
    with new_folder(target, is_overwriting=is_overwriting) as temporary:
        written = write_model_folder(
            temporary, source, documents=_flat(documents), max_shard_bytes=max_shard_bytes, advance=advance
        )
        num_bytes = written.bytes + write_files(temporary, _nested(documents))
    return WrittenFolder(Path(target).absolute(), num_bytes, time.monotonic() - started)


def write_files(
    folder: Path,
    documents: Documents,
    weights: Mapping[str, Sequence[StreamedTensor]] | None = None,
    *,
    advance: Advance = lambda num_bytes: None,
) -> int:
    """Write small files and safetensors files (tensors by file name) into a folder and into those below it.

    Returns the bytes of all of them. advance: told of the bytes of weights.
    """
    total = 0
    for name, content in sorted(_by_folder(documents, has_weights=bool(weights)).items()):
        below = folder / name
        below.mkdir(parents=True, exist_ok=True)
        records = {file: write_bytes(below / file, data) for file, data in content.items()}
        for file, tensors in (weights or {}).items() if not name else ():
            records[file] = write_safetensors(below / file, tensors, metadata={"format": "pt"}, advance=advance)
        manifest = write_manifest(below / CHECKSUMS_FILE, records)
        total += manifest.size + sum(record.size for record in records.values())
    return total


def _by_folder(documents: Documents, *, has_weights: bool) -> dict[str, dict[str, bytes]]:
    """Folder -> file -> content; the folder itself is '', which is there if anything goes into it."""
    found: dict[str, dict[str, bytes]] = {"": {}} if has_weights else {}
    for path, content in documents.items():
        name, _, file = path.rpartition("/")
        found.setdefault(name, {})[file] = content
    return found


def _flat(documents: Documents) -> dict[str, bytes]:
    """Those that lie in the folder itself."""
    return {path: content for path, content in documents.items() if "/" not in path}


def _nested(documents: Documents) -> dict[str, bytes]:
    """Those that lie in folders below."""
    return {path: content for path, content in documents.items() if "/" in path}


def saved_files(save: Callable[[str], object]) -> dict[str, bytes]:
    """What a `save_pretrained` writes, by path below its folder."""
    with TemporaryDirectory() as temporary:
        save(temporary)
        root = Path(temporary)
        return {
            path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
        }
