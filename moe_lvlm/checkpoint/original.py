"""What a checkpoint is written anew from: one of ours, or one of DeepSpeed, opened and not yet read."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_lvlm.checkpoint import layout
from moe_lvlm.checkpoint.base import Base
from moe_lvlm.checkpoint.folder import Log
from moe_lvlm.checkpoint.layout import HAS_OPTIMIZER, CheckpointError, Kind, read_json
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.rewrite import FlatTensor, FlatTensors
from moe_lvlm.checkpoint.verify import file_problems, newest_valid, read_manifest
from moe_lvlm.config.recipe import Recipe

_RUN_CHECKPOINTS = "checkpoints"
# Entered while a source is copied; gives what is called before the copy is published, and raises if it must not be.
Verification = Callable[[], AbstractContextManager[Callable[[], None]]]


@contextmanager
def _nothing_to_verify() -> Iterator[Callable[[], None]]:
    yield lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """What is written anew, before anything is changed.

    path: the folder it comes from. form: what it is, in words. tensors: to be read while they are written. base:
    where the weights are that it leaves out. rng: the generators of each rank that saved. notes: what a user should know
    of it. training_name: what training calls a checkpoint of this stage and step, None if none can go on from it.
    verification: compares the files' checksums while they are copied.
    """

    path: Path
    form: str
    tensors: FlatTensors
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    base: Base | None = None
    rng: Sequence[Mapping[str, Tensor]] = ()
    notes: tuple[str, ...] = ()
    training_name: str | None = None
    verification: Verification = _nothing_to_verify


def open_original(
    source: Path,
    *,
    tag: str | None = None,
    config: Path | None = None,
    recipe: Recipe | None = None,
    stage: str | None = None,
    log: Log = lambda line: None,
) -> Original:
    """A checkpoint of ours or of DeepSpeed, to be written anew.

    For DeepSpeed's: tag: which of its checkpoints, None the one that its `latest` names. config: a config.json, or a
    folder with one, of the model that was trained. recipe, stage: where its steps count; without a recipe training
    cannot go on from the result. Raises ValueError, as `reshard` does.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; allowed: a checkpoint of ours or of DeepSpeed, or a run's folder")
    if stage is not None and recipe is None:
        raise ValueError(f"stage: {stage!r}, but no recipe; give the recipe that has this stage")
    checkpoint, is_verified = source, False
    if (source / _RUN_CHECKPOINTS).is_dir():
        newest = newest_valid(source / _RUN_CHECKPOINTS, log)
        if newest is None:
            raise ValueError(f"{source}: a run without a valid checkpoint in {_RUN_CHECKPOINTS}/")
        checkpoint, is_verified = newest, True
    if (checkpoint / layout.MANIFEST_FILE).is_file() or (checkpoint / layout.INDEX_FILE).is_file():
        given = {"tag": tag, "config": config, "recipe": recipe}
        if foreign := [key for key, value in given.items() if value is not None]:
            raise ValueError(f"{checkpoint}: a checkpoint of ours; {', '.join(foreign)} is for DeepSpeed's alone")
        return _open_ours(checkpoint, is_verified=is_verified)
    return _open_deepspeed(source, tag=tag, config=config, recipe=recipe, stage=stage)


def _open_ours(path: Path, *, is_verified: bool) -> Original:
    files = read_manifest(path)
    tensors = {name: record for name, record in files.items() if layout.is_rank_file(name)}
    others = {name: record for name, record in files.items() if name not in tensors}  # small, and read at once
    if problems := file_problems(path, tensors, is_hashed=False) + file_problems(path, others):
        raise CheckpointError("; ".join(problems[:5]))
    checkpoint = Checkpoint(path)
    if unknown := sorted(checkpoint.index.files() - set(files)):
        raise CheckpointError(f"{path / layout.INDEX_FILE}: names {unknown[0]}, {layout.MANIFEST_FILE} does not")
    generators = [checkpoint.rng(rank) for rank in range(int(checkpoint.state.get("saved_world_size", 0)))]
    return Original(
        path=path,
        form="a checkpoint of ours" + (", whole" if is_verified else ""),
        tensors=_in_file_order(checkpoint),
        config=checkpoint.config,
        state={key: value for key, value in checkpoint.state.items() if key != "format_version"},
        base=checkpoint.base,
        rng=tuple(one for one in generators if one is not None),
        training_name=_training_name(path, checkpoint.state),
        verification=_nothing_to_verify if is_verified else lambda: _verified_meanwhile(path, tensors),
    )


def _training_name(path: Path, state: Mapping[str, Any]) -> str | None:
    stage, _, step = path.name.rpartition("-")
    is_training = "stage" in state and state.get(HAS_OPTIMIZER, True)
    return path.name if is_training and stage and step.isdecimal() else None


def _in_file_order(checkpoint: Checkpoint) -> dict[str, dict[Kind, FlatTensor]]:
    """All tensors, in the order of their first ranges in the files, so that each file is read from front to back."""
    return {
        name: {
            kind: FlatTensor(
                dtype=entry.dtype,
                shape=entry.shape,
                read=_reader(checkpoint, name, kind),
                step=entry.step,
            )
            for kind, entry in checkpoint.index.tensors[name].items()
        }
        for name in checkpoint.names_in_file_order()
    }


def _reader(checkpoint: Checkpoint, name: str, kind: Kind) -> Callable[[int, int], Tensor]:
    return lambda start, stop: checkpoint.view(name, kind, start, stop)


class _Stopped(Exception):
    """The copy ended before the verification did."""


@contextmanager
def _verified_meanwhile(path: Path, files: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Compare all checksums on a thread, beside the copy: it reads ahead, so that the copy finds its pages in memory.

    Gives a function that waits for the comparison and raises CheckpointError if anything is wrong.
    """
    is_over = threading.Event()

    def go_on(num_bytes: int) -> None:
        if is_over.is_set():
            raise _Stopped

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="verify") as pool:
        comparison = pool.submit(file_problems, path, files, advance=go_on, num_threads=1)

        def finish() -> None:
            if problems := comparison.result():
                raise CheckpointError(f"nothing was written, the source is damaged: {'; '.join(problems[:5])}")

        try:
            yield finish
        finally:
            is_over.set()


def _open_deepspeed(
    source: Path, *, tag: str | None, config: Path | None, recipe: Recipe | None, stage: str | None
) -> Original:
    from moe_lvlm.checkpoint.deepspeed_import import is_deepspeed_checkpoint, open_deepspeed  # DeepSpeed takes seconds

    if tag is None and not is_deepspeed_checkpoint(source):
        found = ", ".join(sorted(entry.name for entry in source.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{source}: has {found}; allowed: a checkpoint of ours ({layout.MANIFEST_FILE}), a run's folder "
            f"({_RUN_CHECKPOINTS}/), or a checkpoint of DeepSpeed"
        )
    if config is None:
        raise ValueError(
            f"{source}: a checkpoint of DeepSpeed has no model configuration; give the config.json of the model that "
            "was trained, or a folder with it (--config)"
        )
    opened = open_deepspeed(source, tag=tag)
    has_optimizer = any("master" in kinds for kinds in opened.tensors.values())
    state: dict[str, Any] = {
        "saved_world_size": opened.world_size,
        "learning_rates": dict(opened.learning_rates),
        "engine": dict(opened.engine),
        "global_step": opened.global_steps,
        "imported_from": opened.kind,
    }
    notes, training_name = list(opened.notes), None
    if not has_optimizer:
        state[HAS_OPTIMIZER] = False
    if recipe is not None:
        state |= stage_state(recipe, stage, global_steps=opened.global_steps, world_size=opened.world_size)
        training_name = f"{recipe.stages[state['stage']].name}-{opened.global_steps:06d}" if has_optimizer else None
    else:
        notes.append(
            "without a recipe (--recipe) the result can be loaded, exported and started from; training cannot go on "
            "from it, since nothing says to which stage its steps belong"
        )
    return Original(
        path=Path(opened.path),
        form=f"a checkpoint of DeepSpeed ({opened.kind}; experts: {opened.has_moe or 'none'})",
        tensors=opened.tensors,
        config=read_config(config),
        state=state,
        notes=tuple(notes),
        training_name=training_name,
    )


def read_config(path: Path) -> dict[str, Any]:
    """A model's configuration: of a config.json, or of a folder that holds one. Raises CheckpointError."""
    file = path / layout.CONFIG_FILE if path.is_dir() else path
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file}: {json.dumps(config)[:60]}; allowed: a model's configuration, with a model_type")
    return config


def stage_state(recipe: Recipe, stage: str | None, *, global_steps: int, world_size: int) -> dict[str, Any]:
    """What state.json says of a run that has done so many steps of one stage, the earlier stages being complete.

    stage: its name; None where the recipe has one stage only. Stages of so many epochs count 0 steps in global_step.
    Raises ValueError on any other name, and on steps beyond the stage's end.
    """
    names = [one.name for one in recipe.stages]
    if stage is None and len(names) > 1:
        raise ValueError(f"the recipe has several stages; say to which the steps belong (--stage): {', '.join(names)}")
    if stage is not None and stage not in names:
        raise ValueError(f"stage: {stage!r}; allowed: {', '.join(names)}")
    index = 0 if stage is None else names.index(stage)
    settings = recipe.stages[index]
    if settings.steps is not None and global_steps > settings.steps:
        raise ValueError(f"{global_steps} steps were done; stage {settings.name} of the recipe has {settings.steps}")
    earlier = sum(one.steps or 0 for one in recipe.stages[:index])
    return {
        "stage": index,
        "step": global_steps,
        "global_step": earlier + global_steps,
        "samples": global_steps * settings.global_batch,
        "bad": 0,
        "tokens": 0,
        "is_stage_done": global_steps == settings.steps,
        "world_size": world_size,
        "expert_parallel_size": recipe.parallel.expert_parallel_size,
        "zero_stage": 0,
    }
