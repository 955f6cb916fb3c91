"""One unbroken run of two stages on two processes, shared by all tests, and the server that starts runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_run import write_run_inputs
from tests.training.launching import Server

# World 2, EP 2, ZeRO 2, a checkpoint after every step and none thrown away.
OVERRIDES = ("parallel.expert_parallel_size=2", "train.checkpoint.every=1", "train.checkpoint.keep_last=100")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("outputs"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, its data and its tokenizer."""
    return write_run_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def unbroken(server: Server, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    server.run(["train", str(recipe), *OVERRIDES, f"output_dir={folder}"])
    return folder
