"""A run in the queue, as its user sees it: submitted by the command, watched by its files, and broken on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.training.launching import Events, events

TIME_LIMIT = 300.0  # for a loaded machine; a job takes seconds
ROOT = Path(__file__).resolve().parents[2]


class QueuedRun:
    """A run's folder, and the job that trains in it. environment: of the cluster's commands."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def call(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """A command of SLURM's or ours, in the folder that holds the run's."""
        return subprocess.run(
            [str(word) for word in words],
            cwd=self.folder.parent,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
        )

    def try_submit(self, recipe: str | Path, *words: str) -> subprocess.CompletedProcess[str]:
        """`moe-lvlm submit` on CPUs, with what it answers."""
        output = f"output_dir={json.dumps(str(self.folder))}"
        return self.call(
            sys.executable,
            "-m",
            "moe_lvlm",
            "submit",
            recipe,
            output,
            "--gpus-per-node",
            "0",
            "--stop-before",
            "30",
            *words,
        )

    def submit(self, recipe: str | Path, *words: str) -> str:
        """Submit; the first job's id."""
        done = self.try_submit(recipe, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(":")[0].split()[-1]

    @property
    def log(self) -> Events:
        """What training has logged so far."""
        return events(self.folder)

    @property
    def history(self) -> list[dict[str, Any]]:
        """What the job has noted so far, without times."""
        path = self.folder / "slurm" / "events.jsonl"
        content = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]
        return [{key: value for key, value in line.items() if key != "time"} for line in lines]

    def noted(self, name: str) -> list[dict[str, Any]]:
        """The job's notes of one kind."""
        return [line for line in self.history if line["event"] == name]

    def story(self) -> list[str]:
        """The job's notes in short: `start`, `end crash`, `requeue`, ..."""
        return [
            " ".join([line["event"], *([line["reason"]] if line["event"] == "end" else [])]) for line in self.history
        ]

    def in_queue(self) -> list[str]:
        """Jobs of the cluster that wait or run."""
        return self.call("squeue", "--noheader", "--format=%i %T %r").stdout.splitlines()

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that the job does."""
        limit = time.monotonic() + TIME_LIMIT
        while not condition():
            assert time.monotonic() < limit, f"{what}: waited {TIME_LIMIT} s\n{self.everything()}"
            time.sleep(0.1)

    def wait_for_step(self, stage: str, step: int) -> None:
        """Wait until a step is logged."""
        self.wait_until(
            lambda: any((line["stage"], line["step"]) == (stage, step) for line in self.log.named("step")),
            f"{stage} {step}",
        )

    def wait_until_gone(self) -> None:
        """Wait until no job is in the queue."""
        self.wait_until(lambda: not self.in_queue(), "an empty queue")

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank; data workers are not among them."""
        found = {}
        for process in psutil.process_iter():
            try:
                words, variables = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            is_training = "train" in words and str(self.folder / "slurm" / "recipe.yaml") in words
            if is_training and words[0] == sys.executable:
                found.setdefault(int(variables["RANK"]), process)
        return [found[rank] for rank in sorted(found)]

    def pause(self, stage: str, step: int) -> list[psutil.Process]:
        """Stop all ranks where they are, soon after a step; the same as a step that takes long. They are to be killed
        or to be gone on with."""
        self.wait_for_step(stage, step)
        ranks = self.ranks()
        for process in ranks:
            process.send_signal(signal.SIGSTOP)
        assert not (self.folder / "DONE").exists(), "the run was done before it could be paused"
        return ranks

    def everything(self) -> str:
        """All that is known, for a failed test."""
        texts = [f"queue: {self.in_queue()}", *map(str, self.history)]
        for path in sorted([*self.folder.glob("slurm/*.log"), *self.folder.glob("logs/*.log")]):
            texts.append(f"--- {path.name}\n{path.read_text(encoding='utf-8', errors='replace')[-3000:]}")
        return "\n".join(texts)

    def assert_as_unbroken(self, unbroken: Path) -> None:
        """It is done, and every number of every step is that of a run that nothing happened to."""
        assert (self.folder / "DONE").exists(), self.everything()
        assert self.log.steps() == events(unbroken).steps()


def resume_all(processes: list[psutil.Process]) -> None:
    """Let paused processes go on."""
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
