"""The JSON files of a checkpoint folder, which are written last; the manifest is the last of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_lvlm.checkpoint import layout
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
) -> int:
    """Write index, configuration, state and the manifest of all. files: those that are written already.

    Returns the bytes of all files. A folder without its manifest is no checkpoint, so it is written last.
    """
    records = {
        **files,
        layout.INDEX_FILE: write_json(folder / layout.INDEX_FILE, index.to_json()),
        layout.CONFIG_FILE: write_json(folder / layout.CONFIG_FILE, config),
        layout.STATE_FILE: write_json(folder / layout.STATE_FILE, state),
    }
    manifest = write_manifest(folder / layout.MANIFEST_FILE, records)
    return manifest.size + sum(record.size for record in records.values())


def write_manifest(path: Path, records: Mapping[str, FileRecord]) -> FileRecord:
    """Write size and checksum of each file, and make the folder's entries survive a crash."""
    files = {name: asdict(record) for name, record in sorted(records.items())}
    record = write_json(path, {"format_version": layout.FORMAT_VERSION, "files": files})
    fsync_folder(path.parent)
    return record
