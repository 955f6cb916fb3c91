"""From a recipe and what is asked of the cluster to jobs: their scripts, their files, their order. Touches nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lvlm.config.deepspeed import check_processes
from moe_lvlm.config.identity import describe_change
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.monitoring.folder import DONE, EXCLUDED, RECIPE, SLURM
from moe_lvlm.slurm.files import missing_files
from moe_lvlm.slurm.script import Script, misplaced_directives, render
from moe_lvlm.slurm.settings import JobSettings
from moe_lvlm.slurm.site import JobError
from moe_lvlm.slurm.sweep import variants


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What `moe-lvlm submit` is asked for besides `JobSettings`.

    sweep: `key=value,value`. chain: a job for each stage. until: the stage after which to stop. directory: where
    relative paths begin. command: the user's command line.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    sweep: tuple[str, ...] = ()
    max_parallel: int | None = None
    chain: bool = False
    until: str | None = None
    directory: Path
    command: str


@dataclass(frozen=True, slots=True)
class Job:
    """A job to submit: its script, and each run's folder with its recipe. stage: the last that it trains; None: all."""

    script: Path
    text: str
    runs: dict[Path, Recipe]
    stage: str | None


def plan_jobs(wish: Wish, settings: JobSettings) -> list[Job]:
    """The jobs, in the order in which they are submitted; each waits for the one before.

    Raises:
        RecipeError: a mistake in the recipe, or a batch that does not divide by the job's processes.
        JobError: wishes that do not go together, a run that is done, a folder that cannot be gone on with.
    """
    if wish.sweep and (wish.chain or wish.until):
        raise JobError("--sweep beside --chain or --until; allowed: one of them (a sweep's runs train all stages)")
    if wish.chain and wish.until:
        raise JobError("--chain beside --until; allowed: one of them")
    if wish.max_parallel is not None and not wish.sweep:
        raise JobError("--max-parallel without --sweep; allowed: beside --sweep")
    recipe = load_recipe(wish.recipe, wish.overrides)
    home = _folder(recipe, wish.directory)
    if wish.sweep:
        home = home.with_name(f"{home.name}-sweep")
        runs = _variants(wish, home)
        for run, one in runs.items():
            _check(one, run, settings, wish)
        name = settings.job_name or home.name
        return [_job(wish, settings, runs, home / "job.sbatch", home / "job-%A_%a.log", name)]
    _check(recipe, home, settings, wish)
    name, state = settings.job_name or recipe.name, home / SLURM
    if not wish.chain:
        return [
            _job(wish, settings, {home: recipe}, state / "job.sbatch", state / "job-%j.log", name, stage=wish.until)
        ]
    jobs = []
    for place, stage in enumerate(recipe.stages, start=1):
        is_last = place == len(recipe.stages)
        jobs.append(
            _job(
                wish,
                settings if place == 1 else settings.model_copy(update={"dependency": None}),
                {home: recipe},
                state / f"job-{place}-{stage.name}.sbatch",
                state / "job-%j.log",
                f"{name}-{stage.name}",
                stage=None if is_last else stage.name,
            )
        )
    return jobs


def files_that_are_missing(jobs: Sequence[Job], directory: Path) -> list[str]:
    """A sentence for each file that the jobs' recipes name and that is not there."""
    recipes = [recipe for job in jobs for recipe in job.runs.values()]
    return list(dict.fromkeys(line for recipe in recipes for line in missing_files(recipe, directory)))


def _folder(recipe: Recipe, directory: Path) -> Path:
    return directory / (recipe.output_dir or f"runs/{recipe.name}")


def _variants(wish: Wish, home: Path) -> dict[Path, Recipe]:
    runs = {}
    for variant in variants(wish.sweep):
        run = home / variant.name
        output = f"output_dir={json.dumps(str(run))}"  # a JSON string is a YAML string
        runs[run] = load_recipe(wish.recipe, [*wish.overrides, *variant.overrides, output])
    return runs


def _check(recipe: Recipe, run: Path, settings: JobSettings, wish: Wish) -> None:
    """Find what the job itself would find, before it waits in a queue."""
    check_processes(recipe, settings.world_size, until=wish.until)
    goal = DONE if wish.until is None else f"{DONE}.{wish.until}"
    for mark in {goal, DONE}:
        if (run / mark).exists():
            raise JobError(f"{run}: trained already ({mark} is there); remove the folder, or choose another output_dir")
    if (run / RECIPE).is_file():
        change = describe_change(load_recipe(str(run / RECIPE)), recipe)
        if change is not None:
            raise JobError(f"{run} holds a run of another recipe ({change}); choose another output_dir")


def _job(
    wish: Wish,
    settings: JobSettings,
    runs: dict[Path, Recipe],
    path: Path,
    log: Path,
    name: str,
    *,
    stage: str | None = None,
) -> Job:
    recipes = list(runs.values())
    home = path.parent if len(runs) > 1 else next(iter(runs))
    what = wish.recipe if len(runs) == 1 else f"{len(runs)} runs of {wish.recipe}"
    text = render(
        Script(
            title=" ".join(f"{what}{'' if stage is None else f', up to stage {stage},'} in {home}".split("\n")),
            name=name,
            path=path,
            runs=tuple(runs),
            recipe=RECIPE,
            log=log,
            directory=wish.directory,
            job=_without_bad_nodes(settings, runs),
            cpus_per_process=settings.cpus_per_process or 1 + max(one.data.num_workers for one in recipes),
            python=sys.executable,
            command=wish.command,
            until=stage,
            max_parallel=wish.max_parallel,
        )
    )
    problems = misplaced_directives(text)
    if problems:
        raise JobError("\n".join(f"{path}: {problem}" for problem in problems))
    return Job(path, text, runs, stage)


def _without_bad_nodes(settings: JobSettings, runs: dict[Path, Recipe]) -> JobSettings:
    """Nodes that a run has found to be bad before are not asked for again."""
    files = [run / EXCLUDED for run in runs]
    bad = [node for file in files if file.is_file() for node in file.read_text(encoding="utf-8").split()]
    if not bad:
        return settings
    nodes = dict.fromkeys([*filter(None, [settings.exclude]), *bad])
    return settings.model_copy(update={"exclude": ",".join(nodes)})
