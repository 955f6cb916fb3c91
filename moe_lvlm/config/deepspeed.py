"""A recipe's DeepSpeed dict: mechanics from a file under ds_configs/, everything else from the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_lvlm.config.load import RecipeError, did_you_mean
from moe_lvlm.config.recipe import Recipe, StageSettings

# The one version whose private expert-parallel contract, engine internals and checkpoint files are known.
DEEPSPEED_VERSION = "0.19.8"
# Keys that the recipe, or this module, owns: where their values belong.
_OWNERS: Mapping[str, str] = {
    "train_batch_size": "the recipe's stages.N.global_batch",
    "train_micro_batch_size_per_gpu": "the recipe's stages.N.micro_batch",
    "gradient_accumulation_steps": "nowhere: it follows from the recipe's stages.N.global_batch and micro_batch",
    "gradient_clipping": "the recipe's train.gradient_clipping",
    "bf16": "the recipe's train.precision",
    "fp16": "the recipe's train.precision",
    "amp": "the recipe's train.precision",
    "torch_autocast": "the recipe's train.precision",
    "optimizer": "the recipe's train.optimizer and stages.N.learning_rate",
    "scheduler": "the recipe's train.schedule",
    "activation_checkpointing": "the recipe's train.gradient_checkpointing",
    "expert_parallel": "the recipe's parallel.expert_parallel_size",
    "steps_per_print": "nowhere: the recipe's train.log_every says how often a step is logged",
    "zero_allow_untested_optimizer": "nowhere: it is always true",
    "zero_force_ds_cpu_optimizer": "nowhere: it is always false",
}
# DeepSpeed ignores a key that it does not know, so a misspelt one must be found here.
_MECHANICS = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "prescale_gradients",
    "gradient_predivide_factor",
    "timers",
    "wall_clock_breakdown",
)
# JSON has no comments: what this key says, a string or a list of them, is for readers.
_COMMENT = "_comment"
_NEVER = 10**9  # steps between DeepSpeed's own log lines: ours say the same


def deepspeed_folder() -> Path:
    """The folder of the shipped files: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "ds_configs", package.parent / "ds_configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no ds_configs beside or inside {package}: the installation is incomplete")


def resolve_deepspeed(recipe: Recipe, stage: StageSettings, world_size: int) -> dict[str, Any]:
    """The whole dict for `deepspeed.initialize`, which is given our own optimizer (torch AdamW).

    world_size: number of processes.

    Raises:
        RecipeError: the file is missing, is no JSON object, has an unknown key or a value that the recipe owns; the
            batch does not divide by the processes; or expert parallelism does not fit the processes or the ZeRO stage.
    """
    path, mechanics = _read_mechanics(recipe.parallel.deepspeed)
    expert_parallel_size = recipe.parallel.expert_parallel_size
    if world_size % expert_parallel_size:
        raise RecipeError(
            f"parallel.expert_parallel_size: {expert_parallel_size} does not divide the number of processes "
            f"({world_size}); start a multiple of {expert_parallel_size} processes "
            f"(torchrun --nproc_per_node {expert_parallel_size} -m moe_lvlm train ...) or change the key"
        )
    zero = mechanics.pop("zero_optimization", {})
    _check_zero(path, zero, expert_parallel_size)
    return {
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": _accumulation(stage, world_size),
        # Written even when it is 0 (off): DeepSpeed's own default is 1.
        "gradient_clipping": recipe.train.gradient_clipping,
        "bf16": {"enabled": recipe.train.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Offload with torch's AdamW instead of DeepSpeedCPUAdam, which would compile an extension first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
        **mechanics,
    }


def check_processes(recipe: Recipe, world_size: int, *, until: str | None = None) -> None:
    """Raise RecipeError unless every stage fits so many processes, and `until`, the stage to end after, is one."""
    if until is not None:
        recipe.stage_index(until)
    for stage in recipe.stages:
        resolve_deepspeed(recipe, stage, world_size)


def _accumulation(stage: StageSettings, world_size: int) -> int:
    samples = stage.micro_batch * world_size
    if stage.global_batch % samples:
        raise RecipeError(
            f"stage {stage.name}: global_batch {stage.global_batch} is not a multiple of micro_batch x processes = "
            f"{stage.micro_batch} x {world_size} = {samples}"
        )
    return stage.global_batch // samples


def _read_mechanics(name_or_path: str) -> tuple[Path, dict[str, Any]]:
    """The file of a name or path, and what it says besides "auto"."""
    path = _find(name_or_path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, _DuplicateKeyError) as error:
        raise RecipeError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a DeepSpeed file is a JSON object, this is {data!r}")
    _check_comment(path, data.pop(_COMMENT, ""))
    for key, value in data.items():
        if key in _OWNERS:
            for place, literal in _literals(value, key):
                raise RecipeError(
                    f'{path}: {place}: {literal!r} does not belong here but to {_OWNERS[key]}; allowed: "auto", or absent'
                )
        elif key not in _MECHANICS:
            hint = did_you_mean(key, [*_MECHANICS, *_OWNERS, _COMMENT])
            allowed = ", ".join((*_MECHANICS, _COMMENT))
            raise RecipeError(f"{path}: {key}: unknown key{hint}; allowed: {allowed}")
    return path, {key: value for key, value in data.items() if key in _MECHANICS and value != "auto"}


def _check_comment(path: Path, comment: Any) -> None:
    lines = comment if isinstance(comment, list) else [comment]
    if not all(isinstance(line, str) for line in lines):
        raise RecipeError(f"{path}: {_COMMENT}: {comment!r}; allowed: a string or a list of strings")


def _find(name_or_path: str) -> Path:
    folder = deepspeed_folder()
    if name_or_path.endswith(".json"):
        path = Path(name_or_path)
    else:
        names = sorted(file.stem for file in folder.glob("*.json"))
        if name_or_path not in names:
            raise RecipeError(
                f"parallel.deepspeed: {name_or_path!r} is unknown{did_you_mean(name_or_path, names)}; "
                f"allowed: {', '.join(names)}, or the path of a file that ends in .json"
            )
        path = folder / f"{name_or_path}.json"
    if not path.is_file():
        raise RecipeError(f"parallel.deepspeed: {name_or_path}: no such file")
    return path


class _DuplicateKeyError(ValueError):
    """A key that stands twice in one JSON object."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise _DuplicateKeyError(f"the key {key!r} stands twice")
        seen[key] = value
    return seen


def _literals(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every value below a key that is not "auto", with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _literals(item, f"{place}.{key}")
    elif value != "auto":
        yield place, value


def _check_zero(path: Path, zero: Any, expert_parallel_size: int) -> None:
    """Refuse what DeepSpeed 0.19.8 takes, or asserts on late, with wrong results under expert parallelism."""
    if not isinstance(zero, dict):
        raise RecipeError(f"{path}: zero_optimization: {zero!r}; allowed: an object with a stage")
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise RecipeError(f"{path}: zero_optimization.stage: {stage!r}; allowed: 0, 1, 2, 3")
    if expert_parallel_size == 1:
        return
    because = f"with parallel.expert_parallel_size {expert_parallel_size}"
    if stage == 0:
        raise RecipeError(
            f"{path}: zero_optimization.stage: 0 {because} clips by a wrong gradient norm; allowed: 1, 2, 3"
        )
    if stage in (1, 2) and zero.get("contiguous_gradients", True) is False:
        raise RecipeError(
            f"{path}: zero_optimization.contiguous_gradients: false {because} mixes the gradients of different "
            "experts; allowed: true"
        )
