"""Reading pickle files of DeepSpeed without running what they may hold.

`torch.load(weights_only=True)` builds tensors and plain containers only. DeepSpeed's files also name a few classes of
its own; each is replaced by a stand-in below that keeps data and has no behaviour, so that no class of DeepSpeed is
built, and DeepSpeed is not even imported. Any other name in a file makes it unreadable.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_lvlm.checkpoint.layout import CheckpointError

_T = TypeVar("_T")


class Inert:
    """Data of an object whose class is not wanted: attributes are set, nothing is called."""


# Members of DeepSpeed's ZeroStageEnum, which are pickled by value, or, by Python 3.11.0 to 3.11.3, by name
_ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _zero_stage(owner: object, name: object) -> int:
    """In the place of `getattr` in a pickle: a ZeRO stage by its name, and nothing else."""
    if owner is not int or name not in _ZERO_STAGES:
        raise ValueError(f"its pickle takes the attribute {name!r} of {owner!r}; only names of ZeRO stages are read")
    return _ZERO_STAGES[str(name)]


# What DeepSpeed 0.19.8 writes besides tensors and plain data -> what is built instead
_STAND_INS: tuple[tuple[Callable[..., Any], str], ...] = (
    (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_zero_stage, "builtins.getattr"),
)
_BLOCKED = re.compile(r"(?:GLOBAL|global|function|class) ([\w.]+\.[\w.]+)")


class Record:
    """A dict read from a file, which names the file when something is missing."""

    def __init__(self, data: Mapping[Any, Any], where: Path) -> None:
        self.data = data
        self.where = where

    def get(self, key: str, kind: type[_T]) -> _T:
        """The value of a key that must be there. Raises CheckpointError if it is not, or not of that type."""
        value = self.optional(key, kind)
        if value is None:
            raise CheckpointError(f"{self.where}: has no {key!r}: not the layout of DeepSpeed 0.19.8")
        return value

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        """The same, None where the key is absent or None."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(
                f"{self.where}: {key!r} is a {type(value).__name__}, DeepSpeed 0.19.8 writes a {kind.__name__}"
            )
        return value

    def inside(self, key: str) -> Record:
        """The dict under a key."""
        return Record(self.get(key, dict), self.where)


class TorchFolder:
    """The files of one folder. No file outside of it is opened, whatever a name or a link says."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._real_root = self.root.resolve()

    def names(self) -> list[str]:
        """Files directly in the folder, sorted."""
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_file())

    def has(self, *parts: str) -> bool:
        """Whether the folder has a file of this path."""
        return self._path(parts).is_file()

    def load(self, *parts: str) -> Any:
        """The content of a file, its tensors still on disk (mapped into memory). Raises CheckpointError."""
        path = self._path(parts)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete")
        with torch.serialization.safe_globals(list(_STAND_INS)):
            try:
                # what is not a zip file is torch's format of before 1.6, or torn: that cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except Exception as error:  # a torn or hostile pickle can fail in any way; all are told alike
                raise CheckpointError(f"{path}: {_explain(path, error)}") from error

    def record(self, *parts: str) -> Record:
        """The content of a file that must be a dict."""
        data = self.load(*parts)
        path = self._path(parts)
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: holds a {type(data).__name__}, DeepSpeed 0.19.8 writes a dict")
        return Record(data, path)

    def _path(self, parts: tuple[str, ...]) -> Path:
        path = self.root.joinpath(*parts)
        if not path.resolve().is_relative_to(self._real_root):
            raise CheckpointError(f"{path}: is outside of {self.root}; only files in that folder are read")
        return path


def flat(tensor: Any, what: str) -> Tensor:
    """A tensor of a file as 1-D, not copied. Raises CheckpointError on anything else."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise CheckpointError(f"{what}: a {type(tensor).__name__} instead of a dense tensor")
    if tensor.is_meta:
        raise CheckpointError(f"{what}: a meta tensor, its values were not saved")
    return tensor.detach().reshape(-1)


def _explain(path: Path, error: Exception) -> str:
    """Why a file could not be read: the names in it that are not allowed, else the error itself."""
    blocked: list[str] = []
    if zipfile.is_zipfile(path):
        try:
            blocked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception as second:  # as above; the first error tells enough
            return f"not a readable torch file: {error} ({second})"
    elif found := _BLOCKED.search(str(error)):
        blocked = [found[1]]
    if blocked:
        allowed = ", ".join(name for _, name in _STAND_INS)
        return (
            f"refused, its pickle names {', '.join(sorted(blocked))}, which could run code; allowed are tensors, plain "
            f"data and {allowed}"
        )
    return (
        f"not a readable torch file, torn or of another format: {str(error).splitlines()[0] if str(error) else error!r}"
    )
