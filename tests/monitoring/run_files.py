"""A run's folder, written line by line as training and its jobs write it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

START = 1_790_000_000.0
"""When things begin; times below are seconds after it."""
STAGES = (
    {"name": "tune", "steps": 100, "global_batch": 8},
    {"name": "sparse", "steps": 50, "global_batch": 16},
)


class RunFiles:
    """Writes into one run's folder. `at`: seconds after START."""

    def __init__(self, folder: Path, *, stages: tuple[dict[str, Any], ...] = STAGES, **recipe: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        content = {"name": "demo", "stages": list(stages)} | recipe
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
        self.log_path, self.events_path = folder / "log.jsonl", folder / "slurm" / "events.jsonl"
        self.log_path.touch()

    def log(self, event: str, at: float, **values: Any) -> None:
        """A line of log.jsonl."""
        with self.log_path.open("a") as file:
            file.write(json.dumps({"event": event, **values, "time": START + at}) + "\n")

    def stage(self, name: str, at: float, *, index: int, steps: int, step: int = 0, global_batch: int = 8) -> None:
        values = {"stage": name, "index": index, "steps": steps, "step": step, "global_batch": global_batch}
        self.log("stage", at, **values)

    def step(self, name: str, at: float, *, step: int, global_step: int, **values: Any) -> None:
        """values: further ones of the step, in place of what is usual."""
        usual = {
            "loss": 1.5, "language_loss": 1.25, "balance_loss": 0.25, "learning_rate": 0.001, "grad_norm": 2.0,
            "tokens": 1000, "tokens_per_second": 100.0, "seconds": 10.0, "epoch": 0.5, "expert_load": None,
            "tail_share": None,
        }  # fmt: skip
        self.log("step", at, stage=name, step=step, global_step=global_step, **usual | values)

    def event(self, event: str, at: float, **values: Any) -> None:
        """A line of events.jsonl, with the job's usual job and attempt."""
        self.events_path.parent.mkdir(exist_ok=True)
        usual: dict[str, Any] = {"job": "17"} | ({} if event == "submit" else {"attempt": 1})
        with self.events_path.open("a") as file:
            file.write(json.dumps({"time": START + at, "event": event} | usual | values) + "\n")

    def rank_log(self, rank: int, text: str, *, at: float = 0) -> Path:
        """Add to what a rank printed."""
        path = self.folder / "logs" / f"rank-{rank:03d}.log"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(text)
        os.utime(path, (START + at, START + at))
        return path

    def checkpoint(self, name: str, at: float, *, global_step: int) -> None:
        """A finished one, as far as looking from outside goes."""
        folder = self.folder / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"global_step": global_step}))
        (folder / "manifest.json").write_text("{}")
        os.utime(folder / "manifest.json", (START + at, START + at))


def header(attempt: int, rank: int, node: str, job: str = "17") -> str:
    """How an attempt begins in a rank's log."""
    return f"=== attempt {attempt}, job {job}, rank {rank} on {node}, 2026-11-26T10:00:00Z\n"
