"""What a pack is on disk: a manifest with checksums, archives that are extracted, and files that are copied."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

MANIFEST = "pack.json"
FORMAT_VERSION = 1


def write_manifest(pack: Path, facts: dict[str, Any]) -> None:
    """Write `pack.json`: the facts given, and the size and SHA-256 of every file of the pack."""
    paths = sorted(path for path in pack.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(pack).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in paths
    }
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
    (pack / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def manifest_hash(pack: Path) -> str:
    """Names this version of the pack: it covers every file, through their checksums."""
    return file_hash(pack / MANIFEST)[:12]


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_pack(pack: Path, target: Path) -> None:
    """Check every file of `pack` against its manifest, then make the folder `target` of its files, *.zip extracted.

    `target` appears whole or not at all. If another process makes it at the same time, its copy stays.

    Raises ValueError if a file is missing or differs from its checksum, or if an archive is damaged or unsafe.
    """
    files = _checked_files(pack)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # a folder inside the scratch folder, which only its owner may read: the cache may be shared
        made = scratch / target.name
        made.mkdir()
        for name in files:
            if name.endswith(".zip"):
                extract(pack / name, made)
            else:
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(pack / name, made / name)
        shutil.copyfile(pack / MANIFEST, made / MANIFEST)
        try:
            made.rename(target)
        except OSError:
            # a folder that is not empty is never replaced: another process was first, or the rename truly failed
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch)


def extract(archive: Path, folder: Path) -> None:
    """Extract a zip archive into `folder`.

    Raises ValueError if it is damaged, or before anything is written if a member would land outside of `folder`
    or is neither a plain file nor a folder.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                _check_member(archive, member)
            opened.extractall(folder)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: damaged archive ({error})") from error


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{archive}: unsafe member {name!r}; only relative paths without '..' are allowed")
    # zip archives from Unix keep the mode in the upper half; 0 is a writer that knows no modes
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{archive}: unsafe member {name!r}; links and special files are not allowed")


def _checked_files(pack: Path) -> list[str]:
    """Names of the pack's files, after each was compared with the manifest."""
    manifest_path = pack / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        expected = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest_path}: damaged manifest ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{manifest_path}: format_version {version!r}; this version of moe_lvlm reads {FORMAT_VERSION}"
        )
    for name, expected_hash in expected.items():
        path = pack / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {MANIFEST} lists it; reinstall the package")
        found_hash = file_hash(path)
        if found_hash != expected_hash:
            raise ValueError(
                f"{path}: damaged, its SHA-256 is {found_hash}, {MANIFEST} says {expected_hash}; reinstall the package"
            )
    return list(expected)
