"""A run that ends after a stage, and the marks of finished stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lvlm import cli
from moe_lvlm.training.folder import mark_stages
from tests.training.conftest import OVERRIDES
from tests.training.launching import Server, events
from tests.training.states import assert_same_checkpoint


def marks(run: Path) -> set[str]:
    return {path.name for path in run.glob("DONE*")}


@pytest.mark.distributed
def test_stage_by_stage(server: Server, recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", str(recipe), *OVERRIDES, f"output_dir={run}"]
    server.run([*command, "--until", "tune"])
    assert marks(run) == {"DONE.tune"}
    assert {line["stage"] for line in events(run).named("step")} == {"tune"}
    assert events(run).named("stopped") == events(run).named("done") == []
    assert_same_checkpoint(run / "checkpoints" / "tune-000003", unbroken / "checkpoints" / "tune-000003")

    (run / "DONE.tune").unlink()  # as after a stage that older code trained
    again = server.run([*command, "--until", "tune"])
    assert "stage tune is done already" in again.output
    assert marks(run) == {"DONE.tune"}
    assert len(events(run).named("stage")) == 1

    server.run([*command, "--until", "sparse"])
    assert marks(run) == {"DONE", "DONE.tune", "DONE.sparse"}
    assert events(run).steps() == events(unbroken).steps()
    assert_same_checkpoint(run / "checkpoints" / "sparse-000005", unbroken / "checkpoints" / "sparse-000005")


def test_marks_say_what_is_done(tmp_path: Path) -> None:
    stages = ("one", "two", "three")
    for num_done, expected in (
        (2, {"DONE.one", "DONE.two"}),
        (0, set()),
        (3, {"DONE.one", "DONE.two", "DONE.three"}),
        (1, {"DONE.one"}),
    ):
        mark_stages(tmp_path, stages, num_done=num_done)
        assert marks(tmp_path) == expected


def test_an_unknown_stage(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", str(recipe), f"output_dir={run}", "--until", "spars"]) == 2
    message = "error: spars: no stage of recipe tiny, did you mean 'sparse'?; stages: tune, sparse\n"
    assert capsys.readouterr().err == message
    assert not run.exists()
