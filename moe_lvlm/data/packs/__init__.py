"""Data that ships with the package, found through paths of the form `package:<pack>[/<rest>]`.

A pack is a folder of archives and files here, with a `pack.json` that lists their checksums. It is unpacked once into
`${MOE_LVLM_CACHE:-~/.cache/moe_lvlm}/packs/<pack>-<hash of pack.json>`: a new version never meets an old one's files.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path, PurePosixPath

from moe_lvlm.data.packs.archive import MANIFEST, manifest_hash, unpack_pack

__all__ = ["cache_folder", "known_packs", "resolve", "unpack"]

PREFIX = "package:"
SHIPPED = Path(__file__).parent


def resolve(path: str | Path) -> Path:
    """The real path of `package:<pack>[/<rest>]`, unpacked if need be; any other path comes back as it is.

    Raises ValueError if the pack is unknown or damaged, or if the rest leaves it or names nothing in it.
    """
    text = str(path)
    if not text.startswith(PREFIX):
        return Path(path)
    name, _, rest = text.removeprefix(PREFIX).partition("/")
    parts = PurePosixPath(rest)
    if parts.is_absolute() or ".." in parts.parts or "\\" in rest:
        raise ValueError(f"{text}: the path leaves the pack; give one inside it, as {PREFIX}{name}/<file>")
    folder = unpack(name)
    found = folder / parts
    if not found.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{text}: the path leaves the pack ({found.resolve()})")
    if not found.exists():
        held = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"{text}: pack {name!r} holds no {rest!r}; at its top are {held} (if files went missing from {folder}, "
            "delete that folder and it is unpacked anew)"
        )
    return found


def unpack(name: str, *, shipped: Path = SHIPPED, cache: Path | None = None) -> Path:
    """The folder with the pack's files, made on the first call. Safe to call from several processes at once.

    shipped: the folder of packs. cache: where it is unpacked; None takes `cache_folder()`.

    Raises ValueError if the pack is unknown or damaged.
    """
    known = known_packs(shipped)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{PREFIX}{name}: unknown pack; known are {known}.{hint}")
    pack = shipped / name
    target = (cache or cache_folder()) / f"{name}-{manifest_hash(pack)}"
    # the folder appears by a rename when it is complete, so its existence is enough
    if not target.is_dir():
        unpack_pack(pack, target)
    return target


def known_packs(shipped: Path = SHIPPED) -> list[str]:
    """Names of the packs that ship with the package."""
    return sorted(manifest.parent.name for manifest in shipped.glob(f"*/{MANIFEST}"))


def cache_folder() -> Path:
    """Where packs are unpacked: under $MOE_LVLM_CACHE, or ~/.cache/moe_lvlm if that is not set."""
    root = os.environ.get("MOE_LVLM_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "moe_lvlm") / "packs"
