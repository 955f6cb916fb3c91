"""What runs have left: scores, seconds, routing, one value a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lvlm.analysis.measures import MODALITIES, site_name
from moe_lvlm.analysis.paths import PathStatistics, path_label
from moe_lvlm.analysis.run_folder import RunFolder
from moe_lvlm.analysis.statistics import RoutingStatistics, SiteStatistics
from reproducing.plan import Plan, Run
from reproducing.runs import evaluation, is_evaluated, is_trained
from reproducing.spread import Values, mean_of

PARAMETERS = "parameters"
# numbers of metrics.json that are no shares of 1
_NOT_SHARES = ("perception", "cognition", "n", "words", "reference_words")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One seed of one recipe.

    scores: `<task>.<number>` -> value, shares in per cent. parameters: that the last stage trained. train_seconds: by
    stage, of the logged steps. eval_seconds: of the whole `eval` command. jobs: how many runs went beside each other in the
    evaluation. routing: of the language model's experts. paths: of the connector's. Each None where there are none.
    """

    name: str
    folder: str
    seed: int
    scores: Mapping[str, float]
    parameters: int
    train_seconds: Mapping[str, float]
    eval_seconds: float
    jobs: int
    environment: str | None
    routing: RoutingStatistics | None
    paths: PathStatistics | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the scores' tasks."""
        return tuple(dict.fromkeys(key.partition(".")[0] for key in self.scores))

    def mean_accuracy(self) -> float | None:
        """Of all tasks, each counted once; None if one has none."""
        return mean_of([self.scores.get(f"{task}.accuracy") for task in self.tasks])

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.name,
            "folder": self.folder,
            "seed": self.seed,
            "scores": dict(self.scores),
            "mean_accuracy": self.mean_accuracy(),
            "trained_parameters": self.parameters,
            "train_seconds": dict(self.train_seconds),
            "eval_seconds": self.eval_seconds,
            "jobs": self.jobs,
            "expert_rows_per_token": expert_rows_per_token(self.routing),
            "routing": None if self.routing is None else _routing_json(self.routing),
            "paths": None if self.paths is None else _paths_json(self.paths),
            "environment": self.environment,
        }


@dataclass(frozen=True, slots=True)
class Results:
    """All that is there of a plan. by_row: recipe -> seed -> result, None where a run failed or was not made."""

    seeds: int
    by_row: Mapping[str, Sequence[RunResult | None]]

    def values(self, recipe: str, key: str) -> Values:
        """A score of each seed; `parameters` are those that were trained, in millions."""
        found = self.by_row[recipe]
        if key == PARAMETERS:
            return [None if one is None else one.parameters / 1e6 for one in found]
        return [None if one is None else one.scores.get(key) for one in found]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of any run, in the order of metrics.json."""
        return tuple(dict.fromkeys(task for row in self.by_row.values() for one in row if one for task in one.tasks))


def read_results(plan: Plan, recipes: Sequence[str], seeds: int) -> Results:
    """Read what is trained and evaluated; the rest is None."""
    by_run = {run.name: _read(run) for run in plan.runs if is_trained(run) and is_evaluated(run)}
    return Results(
        seeds, {recipe: [by_run.get(plan.of(recipe, seed).name) for seed in range(seeds)] for recipe in recipes}
    )


def _read(run: Run) -> RunResult:
    folder = RunFolder(run.folder)
    made = evaluation(run.folder)
    assert made is not None  # it is evaluated
    scores = {
        f"{task}.{name}": value if name.rpartition("/")[2] in _NOT_SHARES else 100 * value
        for task, numbers in made["scores"].items()
        for name, value in numbers.items()
    }
    seconds: dict[str, float] = {}
    for step in folder.steps:
        seconds[step["stage"]] = seconds.get(step["stage"], 0.0) + step["seconds"]
    return RunResult(
        name=run.name,
        folder=str(run.folder),
        seed=run.seed,
        scores={key: value for key, value in scores.items() if not key.endswith((".n", ".majority"))},
        parameters=folder.stages[-1]["trainable"],
        train_seconds=seconds,
        eval_seconds=made["seconds"],
        jobs=made["jobs"],
        environment=folder.environment,
        routing=folder.routing,
        paths=folder.paths,
    )


def expert_rows_per_token(routing: RoutingStatistics | None) -> dict[str, float | None]:
    """Routed experts that a token passed, mean over tokens and MoE layers, by modality. Shared experts do not count."""
    sites = [] if routing is None else [values for _, values in routing.items()]
    return {
        modality.name.lower(): mean_of([_rows(values, row) for values in sites])
        for row, modality in enumerate(MODALITIES)
    }


def _rows(values: SiteStatistics, row: int) -> float | None:
    tokens = int(values.tokens[row])
    return float(values.load[row].sum()) / tokens if tokens else None


def _routing_json(routing: RoutingStatistics) -> dict[str, Any]:
    """By layer: what the claims are made from, but for the histograms, which stay in routing.npz."""
    found = {}
    for site, values in routing.items():
        agreement = values.foreground_agreement()
        found[site_name(site)] = {
            "load": {m.name.lower(): values.load[row].tolist() for row, m in enumerate(MODALITIES)},
            "mean_rpv": {m.name.lower(): values.mean_rpv(m) for m in MODALITIES},
            "mean_rpv_tail": values.mean_tail_rpv,
            "mean_rpv_head": values.mean_head_rpv,
            "tail_share": values.tail_share,
            "precision": None if agreement is None else agreement.precision,
            "recall": None if agreement is None else agreement.recall,
            "auc": None if agreement is None else agreement.auc,
            "foreground_share": None if agreement is None else agreement.foreground_share,
        }
    return found


def _paths_json(paths: PathStatistics) -> dict[str, Any]:
    """Images by task and path, and what a path tells of the task."""
    information = paths.task_information()
    return {
        "layers": paths.layers,
        "num_experts": paths.num_experts,
        "counts": {
            task: {path_label(path): count for path, count in paths.counts(task).items()} for task in paths.tasks
        },
        "information": dataclasses.asdict(information) | {"p_value": information.p_value},
    }
