"""A run's folder: made, recognised, and refused when it holds something else."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moe_lvlm.checkpoint.files import replace_text
from moe_lvlm.config.identity import describe_change
from moe_lvlm.config.load import dump_recipe, load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.models.load import CHECKPOINTS, PROCESSOR
from moe_lvlm.training.lock import LOCK

RECIPE = "recipe.yaml"
DONE = "DONE"
BAD_SAMPLES = "bad_samples.jsonl"
HANGS = "hangs"
_OURS = (
    RECIPE, DONE, CHECKPOINTS, PROCESSOR, BAD_SAMPLES, HANGS, "deepspeed.json", "environment.txt", "log.jsonl",
    "tensorboard", "eval", "metrics.json", "report",
)  # fmt: skip
# What may lie there before there is a recipe: a batch job's own, which it writes while we train and which therefore
# stays, and what a run has left that came to its end first.
_BEFORE_RECIPE = ("slurm", "logs", HANGS, LOCK, f".{RECIPE}.tmp")


def run_folder(recipe: Recipe) -> Path:
    """Where the run lies: `output_dir`, or runs/<name>."""
    return Path(recipe.output_dir or f"runs/{recipe.name}")


def prepare_folder(recipe: Recipe, *, resume: bool) -> Path:
    """Make the folder, or check that the run in it may go on with this recipe; `resume=False` clears it first.

    Raises:
        ValueError: a folder that holds something else than a run, or a run of another recipe.
    """
    folder = run_folder(recipe)
    if folder.is_dir() and any(path.name not in _BEFORE_RECIPE for path in folder.iterdir()):
        if not (folder / RECIPE).is_file():
            raise ValueError(
                f"{folder}: not empty and not a run of ours ({RECIPE} is missing); choose another output_dir"
            )
        if resume:
            check_same_run(load_recipe(str(folder / RECIPE)), recipe, folder)
        else:
            _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # whole at every moment: half a recipe, left by a crash or a full disk, would keep the run from going on
    replace_text(folder / RECIPE, dump_recipe(recipe))
    return folder


def adopt_run(source: Path, target: Path) -> list[str]:
    """Make `target` a run's folder by what `source`, a run's folder, holds besides checkpoints and results.

    For a checkpoint that was moved: training goes on there, and the model loads. Returns the names of what was copied;
    nothing is, where the target is a run already or the source is none.
    """
    if not (source / RECIPE).is_file() or (target / RECIPE).is_file():
        return []
    copied = []
    if (source / PROCESSOR).is_dir() and not (target / PROCESSOR).exists():
        shutil.copytree(source / PROCESSOR, target / PROCESSOR)
        copied.append(PROCESSOR)
    replace_text(target / RECIPE, (source / RECIPE).read_text(encoding="utf-8"))  # last: with it the folder is a run
    return [*copied, RECIPE]


def check_same_run(before: Recipe, now: Recipe, folder: Path) -> None:
    """ValueError, naming the keys, if a resume would change what is trained. Topology and logging may change."""
    details = describe_change(before, now)
    if details is not None:
        raise ValueError(f"{folder} holds a run of another recipe ({details}); use --fresh or another output_dir")


def stage_mark(folder: Path, stage: str) -> Path:
    """The file that says that a stage is done."""
    return folder / f"{DONE}.{stage}"


def mark_stages(folder: Path, stages: Sequence[str], *, num_done: int) -> None:
    """Let the marks say what the checkpoint to go on from says: the first `num_done` of all stages are done.

    A run that was killed at the end of a stage, or that older code began, lacks marks; one whose newest checkpoint was
    damaged has one too many.
    """
    for index, stage in enumerate(stages):
        mark = stage_mark(folder, stage)
        if index >= num_done:
            mark.unlink(missing_ok=True)
        elif not mark.exists():
            mark.touch()


def _clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for path in [*(folder / name for name in _OURS), *folder.glob(f"{DONE}.*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def describe_environment(world_size: int) -> str:
    """Versions, machine and command of this start."""
    packages = ("moe-lvlm", "torch", "deepspeed", "transformers", "accelerate", "safetensors")
    lines = [f"command: {' '.join(sys.argv)}", f"python: {platform.python_version()}", f"system: {platform.platform()}"]
    lines += [f"processes: {world_size}", f"threads a process: {torch.get_num_threads()}"]
    for package in packages:
        try:
            lines.append(f"{package}: {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package}: not installed as a package")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines.append(f"devices: {', '.join(devices) or platform.processor() or platform.machine()}")
    return "\n".join(lines) + "\n"


def write_facts(folder: Path, *, deepspeed: Mapping[str, Any], world_size: int) -> None:
    """The resolved DeepSpeed dict of each stage, and the environment."""
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed, indent=2) + "\n", encoding="utf-8")
    (folder / "environment.txt").write_text(describe_environment(world_size), encoding="utf-8")
