"""Writing a checkpoint anew: its tensors in other files, without the optimizer, in another type.

Our format is topology-free: any world size, expert-parallel size and ZeRO stage reads any checkpoint. So resharding
changes which file holds what, and nothing that training would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lvlm.checkpoint.base import Base
from moe_lvlm.checkpoint.files import Advance
from moe_lvlm.checkpoint.folder import Log
from moe_lvlm.checkpoint.layout import HAS_OPTIMIZER, MOMENTS, Kind
from moe_lvlm.checkpoint.model_folder import DEFAULT_SHARD_BYTES
from moe_lvlm.checkpoint.original import Original, open_original
from moe_lvlm.checkpoint.rewrite import FlatTensor, FlatTensors, file_bytes, plan_files, total_bytes, write_checkpoint
from moe_lvlm.checkpoint.save import SaveReport
from moe_lvlm.checkpoint.source import BaseSource
from moe_lvlm.config.recipe import Recipe

DEFAULT_FILE_BYTES = DEFAULT_SHARD_BYTES
_CONVERTED = {torch.float32, torch.bfloat16, torch.float16}  # what another type is made of; integers stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshard:
    """A checkpoint that is ready to be written. tensors, config, state, rng: what it will hold. base: where the weights
    are that it will leave out.

    dropped: the kinds that are left out, and their bytes. converted: how many tensors change their type.
    """

    original: Original
    tensors: FlatTensors
    state: Mapping[str, Any]
    rng: Sequence[Mapping[str, Tensor]]
    base: Base | None
    num_files: int
    dropped: Mapping[Kind, int]
    converted: int
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return total_bytes(self.tensors)

    def files(self) -> dict[str, int]:
        """Bytes of tensors in each file that will be written, by name."""
        return file_bytes(plan_files(self.tensors, self.num_files))

    def kinds(self) -> dict[Kind, tuple[int, int]]:
        """Number of tensors and bytes of each kind."""
        counts: dict[Kind, tuple[int, int]] = {}
        for kinds in self.tensors.values():
            for kind, tensor in kinds.items():
                count, size = counts.get(kind, (0, 0))
                counts[kind] = (count + 1, size + tensor.num_bytes)
        return counts

    def write(
        self,
        directory: Path,
        name: str,
        *,
        is_overwriting: bool = False,
        log: Log = lambda line: None,
        advance: Advance = lambda num_bytes: None,
    ) -> SaveReport:
        """Write `directory`/`name`. Raises as `reshard` does."""
        with self.original.verification() as finish:
            return write_checkpoint(
                directory,
                name,
                self.tensors,
                config=self.original.config,
                state=self.state,
                rng=self.rng,
                base=self.base,
                num_files=self.num_files,
                is_overwriting=is_overwriting,
                before_publishing=finish,
                log=log,
                advance=advance,
            )


def reshard(
    source: Path,
    directory: Path,
    name: str,
    *,
    num_files: int | None = None,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    dtype: torch.dtype | None = None,
    keeps_optimizer: bool = True,
    is_whole: bool = False,
    tag: str | None = None,
    config: Path | None = None,
    recipe: Recipe | None = None,
    stage: str | None = None,
    is_overwriting: bool = False,
    log: Log = lambda line: None,
    advance: Advance = lambda num_bytes: None,
) -> SaveReport:
    """Write a checkpoint anew as `directory`/`name`; the source is read once and its checksums are compared meanwhile.

    source: a checkpoint of ours, a run's folder (its newest valid one), or a checkpoint of DeepSpeed. num_files: how
    many files hold the tensors; None: as few as `max_file_bytes` allows. dtype: of the weights, that is of what is not
    trained, and of everything if the optimizer is dropped; masters and moments stay float32 otherwise, so that a
    resume is exact. keeps_optimizer: False makes masters weights and leaves moments out. is_whole: also write the weights
    that the source leaves out, so that no base is needed any more. tag, config, recipe, stage: for a checkpoint of
    DeepSpeed alone, see `open_original`. advance: told of the bytes written.

    Raises:
        ValueError: a source, or arguments, that cannot be; a target that may not be replaced.
        CheckpointError: the source is damaged, or the base that it is to be completed from; nothing is written then.
        OSError: the disk is full, or fails; nothing is left behind then.
    """
    original = open_original(source, tag=tag, config=config, recipe=recipe, stage=stage, log=log)
    plan = plan_reshard(
        original,
        num_files=num_files,
        max_file_bytes=max_file_bytes,
        dtype=dtype,
        keeps_optimizer=keeps_optimizer,
        is_whole=is_whole,
    )
    return plan.write(directory, name, is_overwriting=is_overwriting, log=log, advance=advance)


def plan_reshard(
    original: Original,
    *,
    num_files: int | None = None,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    dtype: torch.dtype | None = None,
    keeps_optimizer: bool = True,
    is_whole: bool = False,
) -> Reshard:
    """What `reshard` would write, without reading a tensor."""
    if max_file_bytes < 1:
        raise ValueError(f"file size: {max_file_bytes} bytes; allowed: 1 and above")
    tensors: dict[str, dict[Kind, FlatTensor]] = {}
    dropped: dict[Kind, int] = {}
    converted = 0
    base = original.base
    for name, kinds in {**original.tensors, **(_left_out(original) if is_whole else {})}.items():
        kept = dict(kinds)
        if not keeps_optimizer:
            for moment in MOMENTS:
                if moment in kept:
                    dropped[moment] = dropped.get(moment, 0) + kept.pop(moment).num_bytes
            if "master" in kept:
                kept["weight"] = kept.pop("master")
        if dtype is not None and "weight" in kept and kept["weight"].dtype in _CONVERTED - {dtype}:
            kept["weight"] = _converted(kept["weight"], dtype)
            converted += 1
        tensors[name] = kept
    if is_whole:
        base = None
    elif base is not None and dtype is not None:
        base = base.to(dtype)
    has_masters = any("master" in kinds for kinds in tensors.values())
    state, notes = dict(original.state), list(original.notes)
    if not keeps_optimizer:
        state |= {HAS_OPTIMIZER: False, "learning_rates": {}}
        notes.append("the optimizer's state is dropped: a new run or stage can start from the result, none can go on")
    elif converted and has_masters:
        notes.append(
            f"{converted} weights that are not trained change their type; training goes on exactly if it keeps them "
            f"in {str(dtype).removeprefix('torch.')}"
        )
    return Reshard(
        original=original,
        tensors=tensors,
        state=state,
        rng=original.rng if keeps_optimizer else (),
        base=base,
        num_files=num_files if num_files is not None else max(-(-total_bytes(tensors) // max_file_bytes), 1),
        dropped=dropped,
        converted=converted,
        notes=tuple(notes),
    )


def name_problem(plan: Reshard, name: str) -> str | None:
    """A sentence if training would not know the stage of a resharded checkpoint by this name; None if it would."""
    known = plan.original.training_name
    if known is None or not plan.state.get(HAS_OPTIMIZER, True) or name.rpartition("-")[0] == known.rpartition("-")[0]:
        return None
    return f"training knows a checkpoint's stage by its name: it goes on from this one if it is called {known}"


def _left_out(original: Original) -> FlatTensors:
    """The weights that a checkpoint leaves out. Raises CheckpointError if their folder is missing or changed."""
    if original.base is None:
        return {}
    source = BaseSource(original.base, original.path)

    def reader(name: str) -> Callable[[int, int], Tensor]:
        return lambda start, stop: source.read_flat(name, start, stop)

    return {
        name: {"weight": FlatTensor(dtype=one.dtype, shape=one.shape, read=reader(name))}
        for name, one in original.base.tensors.items()
    }


def _converted(tensor: FlatTensor, dtype: torch.dtype) -> FlatTensor:
    read = tensor.read
    return replace(tensor, dtype=dtype, read=lambda start, stop: read(start, stop).to(dtype))
