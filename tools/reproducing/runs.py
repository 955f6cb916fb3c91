"""One run: its folder begun from the shared dense stages, trained and evaluated by the commands that a user gives."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_lvlm.checkpoint.files import replace_text
from moe_lvlm.checkpoint.folder import list_checkpoints
from moe_lvlm.checkpoint.layout import LATEST_FILE, STATE_FILE, read_json
from moe_lvlm.config.load import dump_recipe, load_recipe
from moe_lvlm.models.load import CHECKPOINTS
from moe_lvlm.training.folder import BAD_SAMPLES, DONE, RECIPE, check_same_run
from reproducing.plan import MARK, Dense, Run, evaluation_digest

LOG = "log.jsonl"
METRICS = "metrics.json"
EVALUATED = "reproduced.json"  # in eval/: which evaluation settings gave which scores, and in what time
_TAIL_LINES = 15
# Runs a `moe-lvlm` command of so many processes with its output in a file; the exit status.
Call = Callable[[Sequence[str], int, Path], int]


class RunFailedError(RuntimeError):
    """A command failed. The message has the end of its log."""


class StoppedError(RuntimeError):
    """The run was asked to stop; it has saved and can go on."""


def check_folder(run: Run | Dense) -> None:
    """ValueError, naming the keys, if the folder holds a run of another recipe."""
    stored = run.folder / RECIPE
    if stored.is_file():
        check_same_run(load_recipe(str(stored)), run.recipe, run.folder)
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise ValueError(f"{run.folder}: not empty and no run ({RECIPE} is missing); remove it, or give another --out")


def is_trained(run: Run | Dense) -> bool:
    """Whether its training has ended."""
    return (run.folder / DONE).exists()


def is_evaluated(run: Run) -> bool:
    """Whether metrics.json holds what our evaluation wrote, with today's evaluation settings."""
    made = evaluation(run.folder)
    metrics = run.folder / METRICS
    if made is None or not metrics.is_file():
        return False
    scores = json.loads(metrics.read_text(encoding="utf-8")).get("eval")
    return made["digest"] == evaluation_digest(run.recipe) and made["scores"] == scores


def evaluation(folder: Path) -> dict[str, Any] | None:
    """What `evaluate` noted, or None: digest, scores, seconds and how many runs there were beside it."""
    path = folder / "eval" / EVALUATED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def train_dense(dense: Dense, call: Call, processes: int, log: Path) -> None:
    """Train the dense stages, or go on with them.

    Raises:
        RunFailedError: training ended otherwise than well.
        StoppedError: it was asked to stop, and has saved.
    """
    recipe = dense.folder.with_name(f"{dense.name}.yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    replace_text(recipe, dump_recipe(dense.recipe))
    _train(dense, ["train", str(recipe)], call, processes, log)


def train(run: Run, call: Call, processes: int, log: Path) -> None:
    """Train a run from its dense stages on, or go on with it. Raises as `train_dense` does."""
    if not run.folder.exists():
        begin(run)
    _train(run, train_command(run), call, processes, log)


def train_command(run: Run) -> list[str]:
    """The arguments of `moe-lvlm` that train a run."""
    return ["train", run.source, *run.overrides]


def _train(run: Run | Dense, command: Sequence[str], call: Call, processes: int, log: Path) -> None:
    status = call(command, processes, log)
    if not is_trained(run):
        if status == 0:
            raise StoppedError(f"{run.name}: stopped and saved")
        raise RunFailedError(_failure(run.name, "training", status, log))


def evaluate(run: Run, call: Call, log: Path, *, jobs: int) -> None:
    """Score a trained run, and note under which settings. jobs: how many runs went beside each other, for the record.

    Raises:
        RunFailedError: evaluation ended otherwise than well.
    """
    stored = run.folder / RECIPE
    if evaluation_digest(load_recipe(str(stored))) != evaluation_digest(run.recipe):
        replace_text(stored, dump_recipe(run.recipe))  # `eval` takes its sets from the run's recipe
    (run.folder / METRICS).unlink(missing_ok=True)  # scores of other sets would stay in it
    began = time.monotonic()
    status = call(["eval", str(run.folder)], 1, log)
    seconds = time.monotonic() - began
    if status != 0:
        raise RunFailedError(_failure(run.name, "evaluation", status, log))
    scores = json.loads((run.folder / METRICS).read_text(encoding="utf-8"))["eval"]
    made = {"digest": evaluation_digest(run.recipe), "seconds": round(seconds, 1), "jobs": jobs, "scores": scores}
    (run.folder / "eval").mkdir(exist_ok=True)
    replace_text(run.folder / "eval" / EVALUATED, json.dumps(made, indent=2) + "\n")


def begin(run: Run) -> None:
    """Make a run's folder as its own dense stages would have left it: `train` then goes on with the sparse stage.

    Checkpoints take no more room: their files are links to those of the dense run. They are never written to again.

    Raises:
        ValueError: the dense run has not ended with its last stage.
    """
    folder = run.folder.with_name(f".{run.folder.name}.partial")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    if run.dense is not None:
        _take_over(run.dense, folder)
    (folder / MARK).write_text(json.dumps({"digest": run.digest, "rows": run.rows}, indent=2) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(dump_recipe(run.recipe), encoding="utf-8")
    folder.rename(run.folder)


def _take_over(dense: Dense, folder: Path) -> None:
    newest = next(iter(list_checkpoints(dense.folder / CHECKPOINTS)), None)
    last = len(dense.recipe.stages) - 1
    state = {} if newest is None else read_json(newest / STATE_FILE)
    if newest is None or state.get("stage") != last or not state.get("is_stage_done"):
        raise ValueError(
            f"{dense.folder}: no checkpoint from the end of stage {dense.recipe.stages[last].name!r}; remove the "
            "folder, and its stages are trained anew"
        )
    shutil.copytree(newest, folder / CHECKPOINTS / newest.name, copy_function=_link)
    (folder / CHECKPOINTS / LATEST_FILE).write_text(f"{newest.name}\n", encoding="utf-8")
    for name in (BAD_SAMPLES, LOG):
        if (dense.folder / name).is_file():
            lines = (dense.folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if name != LOG or json.loads(line)["event"] != "done"]
            (folder / name).write_text("".join(kept), encoding="utf-8")


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has no such thing: the content is the same."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _failure(name: str, what: str, status: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    tail = "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:])
    return f"{name}: {what} ended with status {status}; the end of {log}:\n{tail}"
