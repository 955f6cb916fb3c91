"""A recipe's way into the queue: plan, look at it, write the scripts, submit them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moe_lvlm.config.load import dump_recipe
from moe_lvlm.monitoring.folder import EVENTS, SUBMITTED_RECIPE
from moe_lvlm.monitoring.records import read_events
from moe_lvlm.monitoring.records import text as text_of
from moe_lvlm.slurm.plan import Job, Wish, files_that_are_missing, plan_jobs
from moe_lvlm.slurm.queue import check_script, has_slurm, jobs_in_queue, submit_script
from moe_lvlm.slurm.script import misplaced_directives, runs_of
from moe_lvlm.slurm.settings import JobSettings
from moe_lvlm.slurm.site import JobError


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job in the queue."""

    job: Job
    id: str


def dry_run(wish: Wish, settings: JobSettings, say: Callable[[str], None]) -> str:
    """The scripts, as they would be written; what SLURM thinks of each, and what is missing, is said. Writes nothing.

    Raises:
        ValueError: whatever `submit` would refuse, but for files that are missing.
    """
    jobs = plan_jobs(wish, settings)
    for line in files_that_are_missing(jobs, wish.directory):
        say(f"missing here: {line}")
    for job in jobs:
        say(f"{job.script}: {_judged(job)}")
    return "\n".join(job.text for job in jobs)


def _judged(job: Job) -> str:
    """SLURM's answer to a script that lies nowhere yet."""
    if not has_slurm():
        return "not checked by SLURM: there is no sbatch here"
    with TemporaryDirectory() as folder:
        script = Path(folder, "job.sbatch")
        script.write_text(job.text, encoding="utf-8")
        return check_script(script, name=job.script)


def submit(wish: Wish, settings: JobSettings, *, allows_missing: bool = False) -> list[Submitted]:
    """Write the jobs' scripts and recipes beside their runs, and submit them in order.

    Args:
        wish, settings: what is trained, and what is asked of the cluster.
        allows_missing: submit although files that the recipe names are not there (a compute node may see them).

    Raises:
        RecipeError, JobError: a mistake; nothing was submitted, and no script that was there has changed.
    """
    jobs = plan_jobs(wish, settings)
    lacking = [] if allows_missing else files_that_are_missing(jobs, wish.directory)
    if lacking:
        lines = [*lacking, "(--allow-missing submits all the same, where only compute nodes see these files)"]
        raise JobError("\n".join(lines))
    if not has_slurm():
        for job in jobs:
            _write(job)
        scripts = " ".join(str(job.script) for job in jobs)
        raise JobError(
            f"there is no sbatch on this machine; the script is written, submit it where there is one: {scripts}"
        )
    _check_free([run for job in jobs for run in job.runs])
    for job in jobs:
        _judged(job)
    submitted: list[Submitted] = []
    for job in jobs:
        _write(job)
        after = [f"--dependency=afterok:{submitted[-1].id}", "--kill-on-invalid-dep=yes"] if submitted else []
        submitted.append(Submitted(job, submit_script(job.script, options=after)))
        for run in job.runs:
            _note(run / EVENTS, job.script, submitted[-1].id)
    return submitted


def submit_again(script: Path) -> str:
    """Submit a script that is there already, edited or not; the job's id.

    Raises:
        JobError: a mistake in it that SLURM says nothing about, or that it refuses.
    """
    text = script.read_text(encoding="utf-8")
    problems = misplaced_directives(text)
    if problems:
        raise JobError("\n".join(f"{script}: {problem}" for problem in problems))
    if not has_slurm():
        raise JobError("there is no sbatch on this machine")
    runs = runs_of(text)
    _check_free(runs)
    check_script(script)
    job = submit_script(script)
    for run in runs:
        _note(run / EVENTS, script, job)
    return job


def _check_free(runs: Sequence[Path]) -> None:
    """Two jobs in one run's folder: the second would only wait to be refused."""
    for run in dict.fromkeys(runs):
        waiting = jobs_in_queue(_submitted(run / EVENTS))
        if waiting:
            name, state = next(iter(waiting.items()))
            raise JobError(
                f"{run}: job {name} ({state.lower()}) trains here already; wait for it, or end it with scancel {name}"
            )


def _submitted(events: Path) -> list[str]:
    """Jobs that were submitted for a run."""
    records, _ = read_events(events)
    return [text_of(record.get("job")).partition("_")[0] for record in records if record["event"] == "submit"]


def _note(events: Path, script: Path, job: str) -> None:
    line = {"time": int(time.time()), "event": "submit", "job": job, "script": str(script)}
    events.parent.mkdir(parents=True, exist_ok=True)
    with events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _write(job: Job) -> None:
    for run, recipe in job.runs.items():
        (run / SUBMITTED_RECIPE).parent.mkdir(parents=True, exist_ok=True)
        _keep(run / SUBMITTED_RECIPE, dump_recipe(recipe))
    job.script.parent.mkdir(parents=True, exist_ok=True)
    _keep(job.script, job.text)
    job.script.chmod(0o755)


def _keep(path: Path, text: str) -> None:
    """Write a file; one that was there and differs, edited perhaps, stays beside it."""
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (old := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(old)
    path.write_text(text, encoding="utf-8")
