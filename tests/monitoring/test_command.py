"""The commands as a user gives them, and a run that was really trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.monitoring.status import read_status
from tests.monitoring.commands import run_command
from tests.monitoring.run_files import START, RunFiles, header
from tests.tiny_run import write_run_inputs


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFiles:
    """Half of the first stage, after a crash and two bad nodes."""
    monkeypatch.setenv("COLUMNS", "160")
    run = RunFiles(tmp_path / "sweep" / "one")
    run.event("submit", 0, script="job.sbatch")
    run.event("start", 10, nodes="n1,n2")
    run.log("world", 11, world_size=2, hosts=["n1", "n2"], job="17", attempt=1)
    run.stage("tune", 12, index=0, steps=100)
    run.step("tune", 22, step=50, global_step=50, seconds=25.0, tokens=50_000)
    run.event("end", 70, status=137, reason="crash", rank=1, node="n2", detail="n2: task 1: Killed")
    run.event("requeue", 71, exclude="n2")
    (run.folder / "slurm" / "excluded").write_text("n2\nn7\n")
    run.checkpoint("tune-000040", 20, global_step=40)
    run.rank_log(0, header(1, 0, "n1") + "RuntimeError: peer gone\n")
    return run


def test_the_page_of_a_run(run: RunFiles, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("status", str(run.folder))
    page = capsys.readouterr().out
    for text in (
        f"{run.folder}  requeued since",
        "50/100  50.0 %  1/2 tune",
        "50/150  33.3 %",
        "2.00 steps/s, 2,000 tokens/s",
        "25 s for the stage, 1 min 15 s for the run, once it goes on",
        "loss        1.5 (language 1.25, balance 0.25), gradient norm 2, learning rate 0.001, epoch 0.50",
        "tune-000040, step 40 of the run",
        "crash, attempt 1: rank 1 on n2: Killed",
        "excluded nodes: n2, n7",
        f"`moe-lvlm logs {run.folder} --errors --attempt 1`",
    ):
        assert text in page, page


def test_a_line_a_run(run: RunFiles, capsys: pytest.CaptureFixture[str]) -> None:
    other = RunFiles(run.folder.parent / "two")
    other.stage("tune", 0, index=0, steps=100)
    other.step("tune", 10, step=100, global_step=100)
    other.log("stopped", 11, path="x")
    run_command("status", str(run.folder.parent))
    above, first, *lines = capsys.readouterr().out.splitlines()
    assert above == f"{run.folder.parent}:"
    assert first.split()[:4] == ["run", "state", "stage", "step"]
    assert [line.split()[:5] for line in lines] == [
        [run.folder.name, "requeued", "1/2", "tune", "50/150"],
        [other.folder.name, "stopped", "1/2", "tune", "100/150"],
    ]


def test_markup_in_what_others_wrote_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFiles(tmp_path / "[bold]run[/]")
    run.event("start", 10, nodes="[red]n1[/red]")
    run.event("give_up", 11, reason="[/] \x1b[31m\nwhy")
    run_command("status", str(run.folder))
    page = capsys.readouterr().out
    assert "[bold]run[/]" in page.replace("\n", "")
    assert "[red]n1[/red]" in page
    assert "\x1b" not in page


def test_json(run: RunFiles, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("status", str(run.folder), "--json")
    (status,) = json.loads(capsys.readouterr().out)["runs"]
    assert (status["state"], status["since"], status["restarts"]) == ("requeued", START + 71, 0)
    assert status["progress"]["stages"][0] == {"name": "tune", "step": 50, "steps": 100, "global_batch": 8}
    assert status["attempts"][0]["node"] == "n2"
    documented = (Path(__file__).resolve().parents[2] / "docs" / "monitoring.md").read_text()
    assert keys_of(status) <= set(documented.replace("`", " ").replace(",", " ").replace(":", " ").split())


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | set().union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_watching_ends_when_all_is_done(
    run: RunFiles, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []

    def sleep(seconds: int) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            (run.folder / "DONE").touch()

    monkeypatch.setattr("time.sleep", sleep)
    run_command("status", str(run.folder), "--json", "--watch", "5")
    states = [json.loads(line)["runs"][0]["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["requeued", "requeued", "done"]
    assert waited == [5, 5]


def test_logs(run: RunFiles, capsys: pytest.CaptureFixture[str]) -> None:
    run_command("logs", str(run.folder), "-n", "1")
    assert capsys.readouterr().out == "RuntimeError: peer gone\n"
    run_command("logs", str(run.folder), "--errors")
    assert "rank 0 on n1:\n  RuntimeError: peer gone\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("status", "absent"), "absent: no such folder"),
        (("logs", "absent"), "absent: no such folder"),
        (("logs", "sweep"), "sweep: holds runs but is none; give one of them, such as sweep/one"),
        (("logs", "sweep/one", "--rank", "3"), "no log of rank 3; there are those of ranks 0"),
        (("logs", "sweep/one", "-f", "--errors"), "--follow goes with the newest attempt"),
        (("logs", "sweep/one", "-f", "--attempt", "1"), "--follow goes with the newest attempt"),
    ],
)
def test_mistakes(run: RunFiles, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(run.folder.parents[1])
    with pytest.raises(ValueError, match=message):
        run_command(*argv)


@pytest.mark.parametrize(
    "argv",
    [("status",), ("status", ".", "--watch", "0"), ("logs", ".", "--rank", "-1"), ("logs", ".", "--all", "--job")],
)
def test_mistakes_of_the_line(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(*argv)
    assert caught.value.code == 2


TRAIN_IN_TWO_PARTS = """
import sys
import moe_lvlm
recipe = moe_lvlm.load_recipe(sys.argv[1])
moe_lvlm.train(recipe, until="tune")
print("until tune", flush=True)
sys.stdin.read()
moe_lvlm.train(recipe)
"""


def test_a_run_that_was_really_trained(tmp_path: Path) -> None:
    """What training itself writes, stopped after its first stage, and at its end. Without SLURM."""
    run = tmp_path / "run"
    recipe = write_run_inputs(tmp_path)
    command = [sys.executable, "-c", TRAIN_IN_TWO_PARTS, str(recipe)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdin is not None
        assert training.stdout is not None
        assert any(line == "until tune\n" for line in training.stdout)
        status = read_status(run)
        training.stdin.close()
        training.stdout.read()
        assert training.wait(500) == 0
    assert (status.name, status.state, status.problems) == ("tiny", "stopped", ())
    assert [(stage.name, stage.step, stage.steps) for stage in status.progress.stages] == [
        ("tune", 3, 3),
        ("sparse", 0, 5),
    ]
    assert status.checkpoint is not None
    assert (status.checkpoint.name, status.checkpoint.step) == ("tune-000003", 3)

    status = read_status(run)
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if '"event": "step"' in line][-1]
    assert (status.state, status.progress.step, status.progress.steps) == ("done", 8, 8)
    assert status.metrics is not None
    assert (status.metrics.loss, status.metrics.learning_rate) == (last["loss"], last["learning_rate"])
    assert status.metrics.load_lowest is not None
    assert 0 <= status.metrics.load_lowest <= 1 <= (status.metrics.load_highest or 0) <= 4
    assert status.progress.steps_per_second is not None
    assert [(one.outcome, one.first_step, one.last_step, one.lost_steps) for one in status.attempts] == [
        ("stage done", 0, 3, 0),
        ("done", 3, 8, None),
    ]
    assert all(one.nodes for one in status.attempts)
