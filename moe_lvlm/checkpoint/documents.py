"""The JSON files of a checkpoint folder, which are written last; the manifest is the last of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_lvlm.checkpoint import layout
from moe_lvlm.checkpoint.base import Base
from moe_lvlm.checkpoint.files import FileRecord, fsync_folder, write_json
from moe_lvlm.checkpoint.layout import Index

SLACK_BYTES = 16 * 2**20  # what JSON files, headers and generators take at most, for a look at the free space


def write_documents(
    folder: Path,
    files: Mapping[str, FileRecord],
    *,
    index: Index,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    base: Base | None,
) -> int:
    """Write index, configuration, state, base and the manifest of all. files: those that are written already.

    state: all of state.json but its format version. base: where the weights are that are left out; None: none is.
    Returns the bytes of all files. A folder without its manifest is no checkpoint, so it is written last.
    """
    version = layout.FORMAT_VERSION if base is None else layout.FORMAT_WITH_BASE
    records = {
        **files,
        layout.INDEX_FILE: write_json(folder / layout.INDEX_FILE, index.to_json()),
        layout.CONFIG_FILE: write_json(folder / layout.CONFIG_FILE, config),
        layout.STATE_FILE: write_json(folder / layout.STATE_FILE, {"format_version": version, **state}),
    }
    if base is not None:
        records[layout.BASE_FILE] = write_json(folder / layout.BASE_FILE, base.to_json())
    manifest = write_manifest(folder / layout.MANIFEST_FILE, records, version=version)
    return manifest.size + sum(record.size for record in records.values())


def write_manifest(
    path: Path, records: Mapping[str, FileRecord], *, version: int = layout.FORMAT_VERSION
) -> FileRecord:
    """Write size and checksum of each file, and make the folder's entries survive a crash."""
    files = {name: asdict(record) for name, record in sorted(records.items())}
    record = write_json(path, {"format_version": version, "files": files})
    fsync_folder(path.parent)
    return record
