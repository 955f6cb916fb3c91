"""A call of tools/reproduce.py: what there is to do, doing it, and what comes out of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import describe_hardware
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from reproducing import ltdr_claims, qmoe_claims, timing
from reproducing.figures import draw
from reproducing.grid import Grid
from reproducing.jobs import Job, Launcher, launch_command, run_jobs
from reproducing.machine import Machine
from reproducing.paper import Paper, Table
from reproducing.plan import Dense, Plan, Run
from reproducing.results import Results, read_results
from reproducing.runs import (
    CHECKPOINTS,
    RunFailedError,
    StoppedError,
    check_folder,
    evaluate,
    is_evaluated,
    is_trained,
    train,
    train_command,
    train_dense,
)
from reproducing.scores import score_grids

FIGURES, LOGS = "figures", "logs"
# what a paper claims, measured
_CLAIMS = {"ltdr": ltdr_claims.claim_grids, "qmoe": qmoe_claims.claim_grids}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the runs ended. problems: of those that failed. stopped: names of those that can go on."""

    problems: tuple[str, ...]
    stopped: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Tables of a paper that are wanted, and the runs that they need."""

    paper: Paper
    tables: tuple[Table, ...]
    plan: Plan
    out: Path
    scale: str
    seeds: int
    machine: Machine
    launcher: Launcher = field(default_factory=Launcher)

    def check(self) -> None:
        """ValueError where a folder holds something else than what it should."""
        parts: list[Run | Dense] = [*self.plan.dense, *self.plan.runs]
        for one in parts:
            check_folder(one)

    def describe(self) -> str:
        """What would be done, and by which commands."""
        lines = [f"{len(self.plan.runs)} runs in {self.out}, {self.machine.jobs} at a time:"]
        for dense in self.plan.dense:
            lines.append(f"{dense.name}  [{_state(dense)}]  dense stages")
        for run in self.plan.runs:
            lines.append(f"{run.name}  [{_state(run)}]  {', '.join(run.rows)}")
            lines.append(f"    {shlex.join(launch_command(train_command(run), self.machine.processes))}")
        return "\n".join(lines)

    def make_runs(self) -> Outcome:
        """Train and evaluate what is not yet; a KeyboardInterrupt comes out when all have saved."""
        jobs = self._jobs()
        if not jobs:
            return Outcome((), ())
        with _progress(jobs) as on_change:
            run_jobs(jobs, slots=self.machine.jobs, launcher=self.launcher, on_change=on_change)
        return Outcome(
            tuple(job.problem or job.name for job in jobs if job.state == "failed"),
            tuple(job.name for job in jobs if job.state == "stopped"),
        )

    def _jobs(self) -> list[Job]:
        """A job a run that is not done, after the one of its dense stages."""
        jobs: list[Job] = []
        dense: dict[str, Job] = {}
        for run in self.plan.runs:
            if is_trained(run) and is_evaluated(run):
                continue
            before = None
            if run.dense is not None and not run.folder.exists() and not is_trained(run.dense):
                before = dense.get(run.dense.name)
                if before is None:
                    before = Job(run.dense.name, self._dense_work(run.dense))
                    dense[run.dense.name] = before
                    jobs.append(before)
            jobs.append(Job(run.name, self._run_work(run), after=before))
        return jobs

    def _dense_work(self, dense: Dense) -> Any:
        def work(slot: int) -> None:
            train_dense(dense, self._call(slot), self.machine.processes, self._log(dense.name))

        return work

    def _run_work(self, run: Run) -> Any:
        def work(slot: int) -> None:
            call, log = self._call(slot), self._log(run.name)
            if not is_trained(run):
                train(run, call, self.machine.processes, log)
            if self.launcher.is_stopping:
                raise StoppedError(run.name)
            if not (run.folder / CHECKPOINTS).is_dir():
                raise RunFailedError(f"{run.name}: {run.folder / CHECKPOINTS} is gone; remove the folder to train anew")
            evaluate(run, call, log, jobs=self.machine.jobs)

        return work

    def _call(self, slot: int) -> Any:
        return lambda arguments, processes, log: self.launcher.call(arguments, processes, log, slot=slot)

    def _log(self, name: str) -> Path:
        return self.out / LOGS / f"{name}.log"

    def report(self) -> tuple[list[Grid], dict[str, Any]]:
        """All tables, and everything as data. Figures go to <out>/figures, and their paths into the data."""
        recipes = list(dict.fromkeys(row.recipe for table in self.tables for row in table.rows))
        results = read_results(self.plan, recipes, self.seeds)
        grids: list[Grid] = []
        data: dict[str, Any] = {
            "paper": self.paper.name,
            "scale": self.scale,
            "seeds": self.seeds,
            "hardware": _hardware(),
            "tables": {},
        }
        for table in self.tables:
            made, more = self._table(table, results)
            grids += made
            data["tables"][table.name] = {"title": table.title, "grids": [grid.to_json() for grid in made], **more}
            data["tables"][table.name]["rows"] = [
                {
                    "recipe": row.recipe,
                    "label": row.label,
                    "baseline": row.baseline,
                    "paper": dict(zip(table.columns, row.paper, strict=True)) if row.paper else {},
                    "runs": [None if one is None else one.name for one in results.by_row[row.recipe]],
                }
                for row in table.rows
            ]
        found = {one.name: one for row in results.by_row.values() for one in row if one is not None}
        data["runs"] = {name: one.to_json() for name, one in found.items()}
        return grids, data

    def _table(self, table: Table, results: Results) -> tuple[list[Grid], dict[str, Any]]:
        """A table's grids, and what its data hold besides."""
        timed: list[timing.Timed] = []

        def time_rows(table: Table) -> list[Grid]:
            timed.extend(self._timed(table, results))
            return [timing.timing_grid(table, timed)] if timed else []

        if table.kind == "figure":
            path = draw(self.paper.name, table, results, self.out / FIGURES)
            return [], {"figure": None if path is None else str(path)}
        if table.kind == "timing":
            cost = ltdr_claims.expert_cost_grid("Cost by token and run", table, results)
            grids = [*time_rows(table), cost]
        elif table.kind == "claims":
            grids = _CLAIMS[self.paper.name](self.paper, table, results, self.scale, time_rows)
        else:
            grids = score_grids(self.paper, table, results, self.scale)
        return grids, {"timed": timing.to_json(timed)} if timed else {}

    def _timed(self, table: Table, results: Results) -> list[timing.Timed]:
        """Seed 0 measured turn about; nothing at full scale, where models do not fit beside each other and the logs'
        seconds, of one run at a time, must do."""
        wanted = [row.recipe for row in table.rows]
        if self.scale == "full" or not all(results.by_row.get(recipe, [None])[0] for recipe in wanted):
            return []
        return timing.measure([(recipe, self.plan.of(recipe, 0)) for recipe in wanted])


def _state(one: Run | Dense) -> str:
    if is_trained(one):
        return "done" if isinstance(one, Dense) or is_evaluated(one) else "trained"
    return "to be gone on with" if one.folder.exists() else "to do"


def _hardware() -> dict[str, Any]:
    import torch

    return describe_hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _progress(jobs: Sequence[Job]) -> Iterator[Any]:
    """A bar on a terminal, else a line for each job that begins or ends; gives the function that looks anew."""
    seen = {job.name: job.state for job in jobs}
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("runs", total=len(jobs), now="")

        def look() -> None:
            for job in jobs:
                if job.state != seen[job.name]:
                    seen[job.name] = job.state
                    done = sum(one.state not in ("waiting", "running") for one in jobs)
                    if progress.disable:
                        print(f"{job.name}: {job.state} ({done}/{len(jobs)})", file=sys.stderr, flush=True)
            running = [job.name for job in jobs if job.state == "running"]
            progress.update(
                task, completed=sum(job.state in ("done", "failed") for job in jobs), now=", ".join(running)
            )

        yield look


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write everything as JSON; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_markdown(path: Path, grids: Sequence[Grid]) -> None:
    """Write the tables as Markdown; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(grid.markdown() for grid in grids), encoding="utf-8")
