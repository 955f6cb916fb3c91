"""Which files a checkpoint folder of DeepSpeed has, and which of its layouts that is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_lvlm.checkpoint.deepspeed_import.torch_files import TorchFolder
from moe_lvlm.checkpoint.layout import MANIFEST_FILE, CheckpointError

UNIVERSAL_FOLDER = "zero"
_LATEST_FILES = ("latest", "latest_universal")

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_MODEL_ZERO3 = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_PIPELINE = re.compile(r"layer_\d+-model_\d+.*_states\.pt")

# "zero12" means masters in one file a rank (ZeRO 1 and 2, and BF16_Optimizer), "zero0" in the model's file
Layout = Literal["zero0", "zero12", "zero3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Files of a tag's folder by their rank. experts: (layer, expert) -> file."""

    layout: Layout
    is_universal: bool
    models: dict[int, str]
    optimizers: dict[int, str]
    experts: dict[tuple[int, int], str]


def is_tag_folder(path: Path) -> bool:
    """Whether a folder looks like what `engine.save_checkpoint` or ds_to_universal wrote."""
    if not path.is_dir() or (path / MANIFEST_FILE).exists():
        return False
    return any(_MODEL.fullmatch(entry.name) or _MODEL_ZERO3.fullmatch(entry.name) for entry in path.iterdir())


def find_tag_folder(path: Path, tag: str | None) -> Path:
    """The folder of a tag: the one asked for, the path itself, or what `latest` names. Raises CheckpointError."""
    if tag is None and is_tag_folder(path):
        return path
    if tag is None:
        file = next((path / name for name in _LATEST_FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(
                f"{path}: no checkpoint of DeepSpeed: neither *_model_states.pt nor a file named "
                f"{' or '.join(_LATEST_FILES)}"
            )
        tag = file.read_text(encoding="utf-8", errors="replace").strip()
        where = f"{file} names {tag!r}"
    else:
        where = f"tag {tag!r}"
    # a plain name: nothing in a downloaded file may make us open a folder elsewhere
    if tag in ("", ".", "..") or Path(tag).name != tag or "\0" in tag:
        raise CheckpointError(f"{path}: {where}; allowed is the name of a folder in it")
    if not is_tag_folder(path / tag):
        raise CheckpointError(f"{path / tag}: {where}, but that is no folder with *_model_states.pt")
    return path / tag


def list_contents(folder: TorchFolder) -> Contents:
    """Sort the files of a tag's folder. Raises CheckpointError on tensor or pipeline parallelism, and on a mixture."""
    models: dict[int, str] = {}
    zero3_models: dict[int, str] = {}
    optimizers: dict[int, str] = {}
    experts: dict[tuple[int, int], str] = {}
    for name in folder.names():
        if _PIPELINE.fullmatch(name):
            raise CheckpointError(f"{folder.root / name}: pipeline parallelism; allowed is a pipeline of 1 stage")
        if match := _MODEL.fullmatch(name):
            _only_rank_0(folder, name, match[1])
            models[0] = name
        elif match := _MODEL_ZERO3.fullmatch(name):
            _only_rank_0(folder, name, match[2])
            zero3_models[int(match[1])] = name
        elif match := _OPTIMIZER.fullmatch(name):
            _only_rank_0(folder, name, match[2])
            if other := optimizers.get(int(match[1])):
                raise CheckpointError(
                    f"{folder.root}: {other} and {name} are of the same rank: two saves in one folder"
                )
            optimizers[int(match[1])] = name
        elif match := _EXPERT.fullmatch(name):
            _only_rank_0(folder, name, match[3])
            experts[int(match[1]), int(match[2])] = name
    if models and zero3_models:
        raise CheckpointError(f"{folder.root}: has {models[0]} and {zero3_models[min(zero3_models)]}: two saves in one")
    if (folder.root / "offloaded_tensors").exists():
        raise CheckpointError(f"{folder.root}: optimizer states were offloaded to NVMe; allowed are none and cpu")
    layout: Layout = "zero3" if zero3_models else "zero12" if optimizers else "zero0"
    is_universal = (folder.root / UNIVERSAL_FOLDER).is_dir()
    if is_universal and layout == "zero0":
        layout = "zero12"
    return Contents(
        layout=layout,
        is_universal=is_universal,
        models=zero3_models or models,
        optimizers=optimizers,
        experts=experts,
    )


def require_ranks(folder: TorchFolder, files: dict[int, str], world_size: int, what: str) -> None:
    """Raise CheckpointError unless there is one file for each rank that saved."""
    wanted = set(range(world_size))
    if missing := sorted(wanted - files.keys()):
        raise CheckpointError(
            f"{folder.root}: {what} of ranks {missing[:10]} are missing, {world_size} ranks saved: the checkpoint is torn"
        )
    if extra := sorted(files.keys() - wanted):
        raise CheckpointError(
            f"{folder.root / files[extra[0]]}: {world_size} ranks saved, so this file is of another save in this folder"
        )


def _only_rank_0(folder: TorchFolder, name: str, model_parallel_rank: str) -> None:
    if int(model_parallel_rank) != 0:
        raise CheckpointError(f"{folder.root / name}: tensor parallelism; allowed is model-parallel rank 0 only")
