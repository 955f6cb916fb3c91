"""What is known of a model beyond its weights: the run that it comes from, its recipe, its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lvlm.checkpoint.layout import STATE_FILE, read_json
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.recipe import Recipe, StageSettings, Template
from moe_lvlm.models.load import CHECKPOINTS

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
ENVIRONMENT = "environment.txt"
_VERSIONS = ("python", "moe-lvlm", "torch", "deepspeed", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """name: of the run, or of the folder. checkpoint: its folder's name, None for a model folder. steps, tokens: done
    in the run, None if not known. stage: in which the checkpoint was written. scores: of metrics.json, by task.
    versions: what the run was made with, by program. Absent facts are None or empty.
    """

    name: str
    recipe: Recipe | None = None
    checkpoint: str | None = None
    stage: StageSettings | None = None
    steps: int | None = None
    tokens: int | None = None
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def template(self) -> Template:
        """How conversations became text in the stage."""
        if self.recipe is None:
            return "chat"
        return (self.stage and self.stage.template) or self.recipe.data.template


def run_of(model_folder: Path) -> Path:
    """The run's folder that a checkpoint lies in; any other folder is its own."""
    folder = Path(model_folder).absolute()
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else folder


def read_provenance(model_folder: Path) -> Provenance:
    """What a checkpoint's or a model's folder, and the run around it, say.

    Raises:
        ValueError: a recipe, a state or scores that cannot be read.
    """
    folder = Path(model_folder).absolute()
    run = run_of(folder)
    recipe = load_recipe(run / RECIPE) if (run / RECIPE).is_file() else None
    state = read_json(folder / STATE_FILE) if (folder / STATE_FILE).is_file() else {}
    return Provenance(
        name=run.name if recipe is None else recipe.name,
        recipe=recipe,
        checkpoint=folder.name if run != folder else None,
        stage=None if recipe is None else _stage(recipe, folder, is_checkpoint=run != folder),
        steps=state.get("global_step"),
        tokens=state.get("tokens"),
        scores=_scores(run / METRICS),
        versions=_versions(run / ENVIRONMENT),
    )


def _stage(recipe: Recipe, folder: Path, *, is_checkpoint: bool) -> StageSettings:
    """The stage that wrote a checkpoint `<stage>-<step>`; of a model folder, the last one."""
    name = folder.name.rpartition("-")[0]
    found = [stage for stage in recipe.stages if is_checkpoint and stage.name == name]
    return found[0] if found else recipe.stages[-1]


def _scores(path: Path) -> dict[str, Mapping[str, Any]]:
    if not path.is_file():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); mend or remove it") from error
    scores = metrics.get("eval", {}) if isinstance(metrics, dict) else None
    if not isinstance(scores, dict) or not all(isinstance(score, dict) for score in scores.values()):
        raise ValueError(f'{path}: allowed: a JSON object whose "eval" holds a score by task; mend or remove it')
    return scores


def _versions(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = (line.partition(": ") for line in path.read_text(encoding="utf-8").splitlines())
    return {key: value for key, _, value in lines if key in _VERSIONS}
