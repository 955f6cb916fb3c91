"""The tiny recipe, and what one process without a launcher makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.launches import ROOT
from tests.launch.nodes import Nodes, missing, start_nodes
from tests.tiny_run import write_run_inputs

# Long enough to be stopped in the second stage, however quick the machine and slow the launcher.
OVERRIDES = ("stages.0.steps=2", "stages.1.steps=300", "train.checkpoint.every=100")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, its data and its tokenizer."""
    return write_run_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def unbroken(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    line = [sys.executable, "-m", "moe_lvlm", "train", str(recipe), *OVERRIDES, f"output_dir={folder}"]
    done = subprocess.run(line, cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes to be reached by ssh."""
    if reason := missing():
        pytest.skip(reason)
    started = start_nodes(tmp_path_factory.mktemp("nodes"))
    yield started
    started.server.terminate()
    started.server.wait()
