"""What a checkpoint leaves out: weights that no stage has trained, and the folders that they came from.

`base.json` names, for each weight that the checkpoint does not hold, the folder that holds it, its name there, and its
type in the run; and of each folder the files with size, xxh3-128 and time of change. A folder may itself be a
checkpoint with a base. Nothing is copied, so a base has to stay where it is, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_lvlm.checkpoint.files import Advance, hash_file
from moe_lvlm.checkpoint.layout import (
    BASE_FILE,
    DTYPE_NAMES,
    DTYPES,
    FORMAT_WITH_BASE,
    CheckpointError,
    check_format,
    read_json,
)
from moe_lvlm.data.packs import PREFIX, resolve

_REMEDY = (
    "put back what was there (a link from that place to where it lies now will do), or take a checkpoint that holds "
    "all weights (train.checkpoint.save_frozen: true, or tools/reshard.py --whole while the base was there)"
)


@dataclass(frozen=True, slots=True)
class BaseFile:
    """A file as it was. modified: its time of change, in nanoseconds; while size and time agree, so does the rest."""

    size: int
    xxh3_128: str
    modified: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFolder:
    """A folder with weights. name: as the recipe calls it. folder: absolute, or `package:...`. files: by name."""

    name: str
    folder: str
    files: Mapping[str, BaseFile]

    def path(self) -> Path:
        """Where it lies here. Raises ValueError if `package:...` names nothing."""
        return Path(resolve(self.folder))

    def problems(self, *, is_hashed: bool, advance: Advance = lambda num_bytes: None) -> list[str]:
        """How the folder differs from what was recorded, one sentence each; of a checkpoint its own base too.

        is_hashed: read every file; otherwise only those whose time of change is another.
        """
        try:
            path = self.path()
        except ValueError as error:
            return [str(error)]
        if not path.is_dir():
            return [f"{path}: no such folder"]
        looked_at = [_file_problem(path / name, record, is_hashed, advance) for name, record in self.files.items()]
        problems = [one for one in looked_at if one is not None]
        nested = read_base(path) if BASE_FILE in self.files and not problems else None
        return problems if nested is None else nested.problems(is_hashed=is_hashed, advance=advance)

    def num_bytes(self) -> int:
        """Of the files that are recorded, those of a checkpoint's own base not among them."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """One weight that is left out. folder: which one has it. name: what it is called there. dtype: in the run."""

    folder: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Base:
    """Folders, and the weights by their names in the model."""

    folders: tuple[BaseFolder, ...]
    tensors: Mapping[str, BaseTensor]

    @property
    def num_bytes(self) -> int:
        """What the checkpoint saves by it."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def only(self, names: Collection[str]) -> Base | None:
        """The same for some of the weights; None if none of them is left out."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name in names}
        if not kept:
            return None
        used = sorted({tensor.folder for tensor in kept.values()})
        places = {old: new for new, old in enumerate(used)}
        return Base(
            folders=tuple(self.folders[old] for old in used),
            tensors={name: replace(tensor, folder=places[tensor.folder]) for name, tensor in kept.items()},
        )

    def to(self, dtype: torch.dtype) -> Base:
        """The same with floating-point weights of another type."""
        return replace(
            self,
            tensors={
                name: replace(one, dtype=dtype) if one.dtype.is_floating_point else one
                for name, one in self.tensors.items()
            },
        )

    def problems(self, *, is_hashed: bool, advance: Advance = lambda num_bytes: None) -> list[str]:
        """How the folders differ from what was recorded, one sentence each; see `BaseFolder.problems`."""
        return [
            f"base {folder.name}: {problem}"
            for folder in self.folders
            for problem in folder.problems(is_hashed=is_hashed, advance=advance)
        ]

    def check(self, checkpoint: Path) -> None:
        """Raise CheckpointError if a folder is missing or is not what it was. checkpoint: whose base it is."""
        for index, folder in enumerate(self.folders):
            if problems := folder.problems(is_hashed=False):
                count = sum(tensor.folder == index for tensor in self.tensors.values())
                files = ", ".join(f"{name} ({record.size} bytes)" for name, record in folder.files.items())
                raise CheckpointError(
                    f"{checkpoint}: {count} weights that it does not hold are in {folder.folder} "
                    f"({folder.name} of the recipe; recorded: {files}), but: {'; '.join(problems[:3])}; {_REMEDY}"
                )

    def to_json(self) -> dict[str, Any]:
        """Plain data for base.json."""
        return {
            "format_version": FORMAT_WITH_BASE,
            "folders": [
                {
                    "name": one.name,
                    "folder": one.folder,
                    "files": {name: [file.size, file.xxh3_128, file.modified] for name, file in one.files.items()},
                }
                for one in self.folders
            ],
            "tensors": {
                name: [one.folder, one.name, DTYPE_NAMES[one.dtype], list(one.shape)]
                for name, one in sorted(self.tensors.items())
            },
        }

    @staticmethod
    def from_json(data: Any, where: Path) -> Base:
        """Inverse of `to_json`. Raises CheckpointError on anything that does not have its form."""
        check_format(data, where, allowed=(FORMAT_WITH_BASE,))
        try:
            base = Base(
                folders=tuple(_folder(one) for one in data["folders"]),
                tensors={
                    str(name): BaseTensor(int(folder), str(theirs), DTYPES[dtype], tuple(int(size) for size in shape))
                    for name, (folder, theirs, dtype, shape) in data["tensors"].items()
                },
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{where}: no record of a base: {type(error).__name__}: {error}") from error
        for name, tensor in base.tensors.items():
            if not 0 <= tensor.folder < len(base.folders):
                raise CheckpointError(
                    f"{where}: {name} is in folder {tensor.folder}, allowed: 0 to {len(base.folders) - 1}"
                )
        return base


def read_base(checkpoint: Path) -> Base | None:
    """The base of a checkpoint's folder, None if it holds all weights. Raises CheckpointError on a damaged record."""
    where = checkpoint / BASE_FILE
    return Base.from_json(read_json(where), where) if where.is_file() else None


def record_folder(
    path: Path, files: Collection[str], *, name: str, advance: Advance = lambda num_bytes: None
) -> BaseFolder:
    """A folder as it is now, its files hashed. name: what the recipe calls it; kept as the place if it is a package's."""
    is_package = name.startswith(PREFIX) and Path(resolve(name)) == path
    return BaseFolder(
        name=name,
        folder=name if is_package else str(path.absolute()),
        files={file: _record(path / file, advance) for file in sorted(files)},
    )


def _record(path: Path, advance: Advance) -> BaseFile:
    before = path.stat().st_mtime_ns  # read first: a change while it is hashed must not pass for no change
    record = hash_file(path, advance=advance)
    return BaseFile(record.size, record.xxh3_128, before)


def _file_problem(path: Path, record: BaseFile, is_hashed: bool, advance: Advance) -> str | None:
    try:
        found = path.stat()
        if found.st_size != record.size:
            return f"{path}: {found.st_size} bytes, {BASE_FILE} says {record.size}"
        if not is_hashed and found.st_mtime_ns == record.modified:
            return None
        digest = hash_file(path, advance=advance).xxh3_128
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None if digest == record.xxh3_128 else f"{path}: xxh3-128 is {digest}, {BASE_FILE} says {record.xxh3_128}"


def _folder(data: Mapping[str, Any]) -> BaseFolder:
    files = {}
    for name, (size, digest, modified) in data["files"].items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"file {name!r}, allowed are names of files in the folder")
        files[name] = BaseFile(int(size), str(digest), int(modified))
    return BaseFolder(name=str(data["name"]), folder=str(data["folder"]), files=files)
