"""What is to be trained: one run for each different recipe and seed, and the dense stages that runs share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moe_lvlm.config.identity import training_settings
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import Recipe

MARK = "reproduce.json"  # in each of our folders: what it holds, before anything is trained
_DIGEST_LENGTH = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of all runs. scale: tiny, full, or None for recipes without the key. recipes: the names' prefix, or a folder of
    YAML files. processes: of one run. overrides: for every run, in the launcher's form."""

    scale: str | None
    out: Path
    recipes: str
    processes: int = 1
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dense:
    """The dense stages that all rows of a seed begin with. recipe: those stages only; it goes to <folder>.yaml."""

    name: str
    folder: Path
    recipe: Recipe


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One training with its evaluation. rows: recipes that resolve to it. source, overrides: how a user would start it.
    dense: None where the recipe begins sparse, or stays dense."""

    name: str
    digest: str
    seed: int
    rows: tuple[str, ...]
    folder: Path
    recipe: Recipe
    source: str
    overrides: tuple[str, ...]
    dense: Dense | None


@dataclass(frozen=True, slots=True)
class Plan:
    """runs: seed by seed, so that the first results of all rows come early."""

    runs: tuple[Run, ...]

    @property
    def dense(self) -> tuple[Dense, ...]:
        """Each dense part once."""
        return tuple({run.dense.name: run.dense for run in self.runs if run.dense is not None}.values())

    def of(self, recipe: str, seed: int) -> Run:
        """The run of a row."""
        return next(run for run in self.runs if run.seed == seed and recipe in run.rows)


def make_plan(recipes: Sequence[str], seeds: int, options: Options) -> Plan:
    """Resolve every row's recipe for every seed; equal ones become one run.

    Raises:
        ValueError: a recipe that is missing or wrong, or a folder that holds a run of another recipe.
    """
    existing = _existing(options.out)
    runs: list[Run] = []
    for seed in range(seeds):
        by_digest: dict[str, list[str]] = {}
        for name in dict.fromkeys(recipes):
            by_digest.setdefault(training_digest(_load(name, seed, options)), []).append(name)
        runs += [_run(tuple(names), seed, digest, existing, options) for digest, names in by_digest.items()]
    return Plan(tuple(runs))


def _source(name: str, options: Options) -> str:
    folder = Path(options.recipes)
    return str(folder / f"{name}.yaml") if folder.is_dir() else f"{options.recipes}/{name}"


def _overrides(name: str, seed: int, options: Options) -> tuple[str, ...]:
    scale = () if options.scale is None else (f"scale={options.scale}",)
    given = (*scale, f"seed={seed}", *options.overrides)
    # experts are spread over processes: no further than there are
    size = _read(_source(name, options), given).parallel.expert_parallel_size
    fitting = math.gcd(size, options.processes)
    return given if fitting == size else (*given, f"parallel.expert_parallel_size={fitting}")


def _load(name: str, seed: int, options: Options, folder: Path | None = None) -> Recipe:
    where = () if folder is None else (f"output_dir={folder}",)
    return _read(_source(name, options), (*_overrides(name, seed, options), *where))


@cache
def _read(source: str, overrides: tuple[str, ...]) -> Recipe:
    return load_recipe(source, overrides)


def _run(names: tuple[str, ...], seed: int, digest: str, existing: dict[str, Path], options: Options) -> Run:
    """The run of some rows: where a run of its digest lies, or in a folder named after the first of them."""
    folder = existing.get(digest) or options.out / f"{names[0]}-{options.scale or 'plain'}-s{seed}"
    name = names[0]
    return Run(
        name=folder.name,
        digest=digest,
        seed=seed,
        rows=names,
        folder=folder,
        recipe=_load(name, seed, options, folder),
        source=_source(name, options),
        overrides=(*_overrides(name, seed, options), f"output_dir={folder}"),
        dense=_dense(_load(name, seed, options), options),
    )


def _dense(recipe: Recipe, options: Options) -> Dense | None:
    """The stages before the one that upcycles or adapts. Nothing of them depends on the MoE or the adapter, so these and
    what only routers and gates read are left at their defaults. Attention weights, which only a router asks for (`eager`), are computed in another order by
    other kernels: rounding. Such a row begins with the same dense model as the others all the same."""
    sparse = next((index for index, stage in enumerate(recipe.stages) if stage.upcycle or stage.adapt), 0)
    if sparse == 0:
        return None
    attention = "sdpa" if recipe.model.attention == "eager" else recipe.model.attention
    dense = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"attention": attention, "adapter": None}),
            "moe": MoEConfig(),
            "data": recipe.data.model_copy(update={"task_types": (), "clusters": None}),
            "parallel": recipe.parallel.model_copy(update={"expert_parallel_size": 1}),
            "stages": recipe.stages[:sparse],
        }
    )
    name = f"dense-{training_digest(dense)}-s{recipe.seed}"
    folder = options.out / name
    return Dense(name=name, folder=folder, recipe=dense.model_copy(update={"name": name, "output_dir": str(folder)}))


def training_digest(recipe: Recipe) -> str:
    """Of all in a recipe that decides what is trained, and so whether two rows are one run."""
    return _digest(training_settings(recipe))


def evaluation_digest(recipe: Recipe) -> str:
    """Of what decides scores and routing statistics, given the model."""
    return _digest(recipe.evaluation.model_dump(mode="json"))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:_DIGEST_LENGTH]


def _existing(out: Path) -> dict[str, Path]:
    """Runs that were begun in the folder, by digest."""
    found = {}
    for mark in sorted(out.glob(f"*/{MARK}")):
        found[str(json.loads(mark.read_text(encoding="utf-8"))["digest"])] = mark.parent
    return found
