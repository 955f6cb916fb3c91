"""How far a run is: its stages by recipe and log, and how long what is left will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_lvlm.config.yaml_text import parse_yaml
from moe_lvlm.monitoring.folder import RECIPE, SUBMITTED_RECIPE
from moe_lvlm.monitoring.records import number, text, whole
from moe_lvlm.monitoring.training_log import TrainingLog


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """step: steps done. steps: in all; None if only the data tell (a stage given in epochs that has not begun).
    global_batch: samples a step; None if nothing says."""

    name: str
    step: int
    steps: int | None
    global_batch: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """stages: all of the run. current: the place in them of the one that is trained, or was last; None before training.
    step, steps: of the whole run; steps is None unless all stages' are known.

    steps_per_second, tokens_per_second: over the last logged steps of the current stage; None without any.
    stage_seconds, run_seconds: that the stage and the run still need at this speed. Later stages are taken to need
    as long for a sample as this one.
    """

    stages: tuple[StageProgress, ...]
    current: int | None
    step: int
    steps: int | None
    steps_per_second: float | None
    tokens_per_second: float | None
    stage_seconds: float | None
    run_seconds: float | None


@dataclass(frozen=True, slots=True)
class RecipeFacts:
    """What is needed of a resolved recipe. hang_timeout: seconds, None if it says nothing. problem: why the file could
    not be read, or ""."""

    name: str
    stages: tuple[StageProgress, ...]
    hang_timeout: float | None
    problem: str


def read_recipe_facts(run: Path) -> RecipeFacts:
    """Of the run's own recipe, or of the one it was submitted with. Older recipes and unknown keys are no problem."""
    path = next((run / name for name in (RECIPE, SUBMITTED_RECIPE) if (run / name).is_file()), run / RECIPE)
    try:
        recipe = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return RecipeFacts("", (), None, "")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return RecipeFacts("", (), None, f"{path}: not YAML: {text(str(error))}")
    if not isinstance(recipe, dict):
        return RecipeFacts("", (), None, f"{path}: {type(recipe).__name__}; allowed: a mapping of keys")
    stages = recipe.get("stages")
    train = recipe.get("train")
    return RecipeFacts(
        name=text(recipe.get("name")),
        stages=tuple(_planned(stage) for stage in stages if isinstance(stage, dict))
        if isinstance(stages, list)
        else (),
        hang_timeout=number(train.get("hang_timeout")) if isinstance(train, dict) else None,
        problem="",
    )


def _planned(stage: Mapping[str, Any]) -> StageProgress:
    return StageProgress(
        name=text(stage.get("name")),
        step=0,
        steps=whole(stage.get("steps")),
        global_batch=whole(stage.get("global_batch")),
    )


def measure_progress(planned: Sequence[StageProgress], log: TrainingLog, *, is_done: bool) -> Progress:
    """Lay what the log says over the recipe's stages."""
    stages = list(planned)
    for seen in log.stages.values():
        if seen.name not in [stage.name for stage in stages]:
            stages.append(StageProgress(name=seen.name, step=0, steps=None, global_batch=None))
    names = [stage.name for stage in stages]
    current = None if log.stage is None else names.index(log.stage.name)
    laid = tuple(
        _laid(stage, log, is_past=is_done or (current is not None and place < current))
        for place, stage in enumerate(stages)
    )
    known = [stage.steps for stage in laid if stage.steps is not None]
    steps = sum(known) if laid and len(known) == len(laid) else None
    speed = log.speed
    left = (None, None) if is_done or current is None or speed is None else _left(laid, current, speed.steps_per_second)
    return Progress(
        stages=laid,
        current=current,
        step=log.global_step,
        steps=steps,
        steps_per_second=None if speed is None else speed.steps_per_second,
        tokens_per_second=None if speed is None else speed.tokens_per_second,
        stage_seconds=left[0],
        run_seconds=left[1],
    )


def _laid(stage: StageProgress, log: TrainingLog, *, is_past: bool) -> StageProgress:
    seen = log.stages.get(stage.name)
    steps = stage.steps if seen is None or seen.steps is None else seen.steps
    step = 0
    if is_past:
        step = steps or 0
    elif log.stage is not None and log.stage.name == stage.name:
        step = log.step
    batch = stage.global_batch if seen is None or seen.global_batch is None else seen.global_batch
    return StageProgress(name=stage.name, step=step, steps=steps, global_batch=batch)


def _left(stages: Sequence[StageProgress], current: int, steps_per_second: float) -> tuple[float | None, float | None]:
    """Seconds that the current stage and the whole run still need."""
    stage = stages[current]
    if stage.steps is None:
        return None, None
    stage_seconds = max(stage.steps - stage.step, 0) / steps_per_second
    later = stages[current + 1 :]
    if not later:
        return stage_seconds, stage_seconds
    if not stage.global_batch or any(one.steps is None or not one.global_batch for one in later):
        return stage_seconds, None
    samples = sum((one.steps or 0) * (one.global_batch or 0) for one in later)
    return stage_seconds, stage_seconds + samples / (steps_per_second * stage.global_batch)
