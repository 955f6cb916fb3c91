"""Gradients that are no numbers: their steps are left out and said, and end the run on every process alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.checkpoint.verify import newest_valid, verify
from tests.training.conftest import OVERRIDES
from tests.training.launching import Server, events

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_ends_the_run_everywhere(precision: str, server: Server, recipe: Path, tmp_path: Path) -> None:
    """The first step makes the weights absurd, all later ones have no gradient; the third of these is too many."""
    run = tmp_path / "run"
    settings = ["stages.0.steps=9", "stages.0.learning_rate=1e30", "train.max_skipped_steps=3"]
    command = ["train", str(recipe), *OVERRIDES, *settings, f"train.precision={precision}", f"output_dir={run}"]
    job = server.start(command)
    assert job.wait() == [1, 1], job.output
    assert job.output.count("TrainingDivergedError: 3 steps in a row") == 2
    assert [line["step"] for line in events(run).named("skipped")] == [2, 3, 4]
    assert not (run / "DONE").exists()

    newest = newest_valid(run / "checkpoints", print)
    assert newest is not None and newest.name == "tune-000003"
    assert verify(newest, is_finite_checked=True) == []
    before, after = open_source(run / "checkpoints" / "tune-000001"), open_source(newest)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())
