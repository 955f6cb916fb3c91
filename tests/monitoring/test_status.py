"""What is said of runs whose files were written by hand; expected numbers are worked out by hand."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moe_lvlm.checkpoint import layout
from moe_lvlm.models import load
from moe_lvlm.monitoring import folder as names
from moe_lvlm.monitoring.folder import find_runs
from moe_lvlm.monitoring.page import status_page, status_table
from moe_lvlm.monitoring.status import RunStatus, read_status
from moe_lvlm.training import folder as training_folder
from moe_lvlm.training.lock import LOCK
from tests.monitoring.run_files import START, RunFiles


def status_at(run: RunFiles, at: float) -> RunStatus:
    return read_status(run.folder, START + at)


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path / "run")


def train(run: RunFiles, *, first: int, last: int, at: float, every: int = 10, seconds: float = 10.0) -> None:
    """Logged steps of the first stage, one every so many seconds."""
    for place, step in enumerate(range(first + every, last + 1, every), start=1):
        run.step("tune", at + place * seconds, step=step, global_step=step, seconds=seconds)


def test_names_are_those_of_training() -> None:
    assert (names.RECIPE, names.DONE, names.BAD_SAMPLES, names.HANGS) == (
        training_folder.RECIPE,
        training_folder.DONE,
        training_folder.BAD_SAMPLES,
        training_folder.HANGS,
    )
    assert (names.CHECKPOINTS, names.LOCK) == (load.CHECKPOINTS, LOCK)
    assert layout.MANIFEST_FILE == "manifest.json"
    assert layout.STATE_FILE == "state.json"


def test_progress_speed_and_time_left(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    run.step("tune", 90, step=10, global_step=10, seconds=90.0)  # warms up: not part of the speed
    run.step("tune", 110, step=20, global_step=20, seconds=20.0, tokens=3000)
    run.step("tune", 120, step=30, global_step=30, seconds=10.0, tokens=1500)
    status = status_at(run, 125)
    progress = status.progress
    assert (status.name, status.state, status.since) == ("demo", "running", START)
    assert (progress.current, progress.step, progress.steps) == (0, 30, 150)
    assert [(stage.name, stage.step, stage.steps) for stage in progress.stages] == [
        ("tune", 30, 100),
        ("sparse", 0, 50),
    ]
    assert progress.steps_per_second == pytest.approx(20 / 30)
    assert progress.tokens_per_second == pytest.approx(4500 / 30)
    assert progress.stage_seconds == pytest.approx(70 * 1.5)
    # 50 steps of 16 samples take as long as 100 of 8
    assert progress.run_seconds == pytest.approx(70 * 1.5 + 100 * 1.5)


def test_the_first_logged_step_alone_gives_a_speed(run: RunFiles) -> None:
    run.log("resume", 0, path="tune-000040", global_step=40)
    run.stage("tune", 1, index=0, steps=100, step=40)
    run.step("tune", 21, step=50, global_step=50, seconds=20.0)
    assert status_at(run, 22).progress.steps_per_second == pytest.approx(0.5)


def test_repeated_steps_and_the_gap_between_attempts(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    train(run, first=0, last=50, at=0)
    run.log("resume", 5000, path="tune-000020", global_step=20)
    run.stage("tune", 5001, index=0, steps=100, step=20)
    status = status_at(run, 5002)
    assert status.progress.step == status.progress.stages[0].step == 20
    assert status.progress.steps_per_second == pytest.approx(1.0)  # still that of the attempt before
    train(run, first=20, last=40, at=5001, seconds=20.0)
    status = status_at(run, 5042)
    assert status.progress.step == 40
    assert status.progress.steps_per_second == pytest.approx(0.5)
    gained = [(one.number, one.outcome, one.first_step, one.last_step, one.lost_steps) for one in status.attempts]
    assert gained == [(1, "lost", 0, 50, 30), (2, "running", 20, 40, None)]
    assert status.restarts == 1


def test_the_speed_is_that_of_the_last_twenty_logged_steps(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    train(run, first=0, last=40, at=0, every=1, seconds=1.0)
    train(run, first=40, last=60, at=40, every=1, seconds=4.0)
    assert status_at(run, 121).progress.steps_per_second == pytest.approx(0.25)


def test_stages_given_in_epochs_are_known_once_they_begin(tmp_path: Path) -> None:
    stages = ({"name": "tune", "epochs": 1.0, "global_batch": 8}, {"name": "sparse", "epochs": 2.0, "global_batch": 8})
    run = RunFiles(tmp_path / "run", stages=stages)
    run.stage("tune", 0, index=0, steps=30)
    run.step("tune", 10, step=10, global_step=10)
    progress = status_at(run, 11).progress
    assert (progress.steps, progress.stage_seconds, progress.run_seconds) == (None, pytest.approx(20.0), None)
    run.stage("sparse", 40, index=1, steps=70)
    progress = status_at(run, 41).progress
    assert (progress.current, progress.steps) == (1, 100)
    assert [(stage.step, stage.steps) for stage in progress.stages] == [(30, 30), (0, 70)]
    assert progress.stage_seconds is None  # nothing is known of this stage's speed


def test_metrics_of_the_last_step(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    run.step(
        "tune", 10, step=10, global_step=10,
        expert_load={"0": {"language": [10, 20, 30, 30], "vision": [10, 0, 0, 0]}, "1": {"language": [0, 50], "vision": [10, 20]}},
        dropped={"0": {"language": [5, 5, 0, 0], "vision": [10, 0, 0, 5]}},
    )  # fmt: skip
    metrics = status_at(run, 11).metrics
    assert metrics is not None
    assert (metrics.loss, metrics.balance_loss, metrics.grad_norm) == (1.5, 0.25, 2.0)
    assert (metrics.learning_rate, metrics.epoch) == (0.001, 0.5)
    assert metrics.dropped_share == pytest.approx(25 / 125)  # of layer 0 alone, which can drop
    # layer 0: 20, 20, 30, 30 of 25 on average; layer 1: 10 and 70 of 40
    assert (metrics.load_lowest, metrics.load_highest) == (pytest.approx(0.25), pytest.approx(1.75))


def test_numbers_that_are_none_are_none(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    run.step("tune", 10, step=10, global_step=10, loss=None, grad_norm=None)
    metrics = status_at(run, 11).metrics
    assert metrics is not None
    assert (metrics.loss, metrics.grad_norm, metrics.load_lowest, metrics.dropped_share) == (None, None, None, None)


def test_what_else_lies_in_the_folder(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    run.log("skipped", 5, step=3, reason="gradients are not finite")
    run.log("skipped", 6, step=4, reason="gradients are not finite")
    run.log("resume", 10, path="x", global_step=2)
    run.stage("tune", 11, index=0, steps=100, step=2)
    run.log("skipped", 15, step=3, reason="gradients are not finite")
    run.checkpoint("tune-000009", 20, global_step=9)
    run.checkpoint("tune-000010", 30, global_step=10)
    run.checkpoint(".tune-000011.tmp", 40, global_step=11)  # being written
    (run.folder / "checkpoints" / "tune-000012").mkdir()  # without a manifest
    (run.folder / "bad_samples.jsonl").write_text('{"file": "a"}\n{"file": "b"}\n{"fi')
    (run.folder / "metrics.json").write_text(
        json.dumps({"eval": {"color": {"accuracy": 0.5, "majority": 0.25, "n": 4}}})
    )
    status = status_at(run, 75)
    assert status.skipped_steps == 2
    assert status.bad_samples == 2
    assert status.checkpoint is not None
    assert (status.checkpoint.name, status.checkpoint.step, status.checkpoint.age) == ("tune-000010", 10, 45.0)
    assert [(one.task, one.accuracy, one.majority, one.n) for one in status.scores] == [("color", 0.5, 0.25, 4)]


def test_a_crash_and_a_requeue(run: RunFiles) -> None:
    run.event("submit", 0, script="runs/demo/slurm/job.sbatch")
    assert status_at(run, 1).state == "queued"
    run.event("start", 10, nodes="n1,n2", checkpoint="")
    run.log("world", 12, world_size=4, hosts=["n1", "n1", "n2", "n2"], job="17", attempt=1)
    run.stage("tune", 20, index=0, steps=100)
    train(run, first=0, last=30, at=20)
    status = status_at(run, 60)
    assert (status.state, status.since) == ("running", START + 10)
    run.event(
        "end", 70, status=137, reason="crash", rank=3, node="n2", detail="n2: task 3: Killed", checkpoint="tune-000020", progress=True
    )  # fmt: skip
    assert status_at(run, 70).state == "failed"
    run.event("requeue", 71, exclude="")
    run.rank_log(0, "hello\n")
    status = status_at(run, 80)
    assert (status.state, status.since) == ("requeued", START + 71)
    (attempt,) = status.attempts
    assert (attempt.number, attempt.job, attempt.nodes, attempt.outcome, attempt.status) == (
        1,
        "17",
        "n1,n2",
        "crash",
        137,
    )
    assert (attempt.began, attempt.ended) == (START + 10, START + 70)
    assert attempt.cause == "rank 3 on n2: Killed"
    assert f"`moe-lvlm logs {run.folder} --rank 3 --attempt 1`" in status.hints[0]
    run.event("start", 90, nodes="n1,n3", checkpoint="tune-000020", attempt=2)
    run.log("world", 92, world_size=4, hosts=["n1", "n1", "n3", "n3"], job="17", attempt=2)
    run.log("resume", 93, path="x/tune-000020", global_step=20)
    run.stage("tune", 94, index=0, steps=100, step=20)
    status = status_at(run, 95)
    assert status.state == "running"
    assert [(one.outcome, one.first_step, one.last_step, one.lost_steps) for one in status.attempts] == [
        ("crash", 0, 30, 10),
        ("running", 20, 20, None),
    ]


def test_an_attempt_without_an_end_is_lost(run: RunFiles) -> None:
    run.event("submit", 0)
    run.event("start", 10, nodes="n1")
    run.stage("tune", 20, index=0, steps=100)
    train(run, first=0, last=20, at=20)
    run.event("lost", 100)
    run.event("start", 100, nodes="n2", attempt=2)
    lost, now = status_at(run, 101).attempts
    assert (lost.outcome, lost.ended, lost.last_step) == ("lost", START + 40, 20)
    assert (now.outcome, now.ended, now.first_step) == ("running", None, None)


@pytest.mark.parametrize("field", [1, 2], ids=["its own number", "the next number"])
def test_lost_is_said_of_the_attempt_before(run: RunFiles, field: int) -> None:
    run.event("start", 10, nodes="n1")
    run.event("lost", 100, attempt=field)
    assert [one.outcome for one in status_at(run, 101).attempts] == ["lost"]


def test_a_stop_before_the_time_limit(run: RunFiles) -> None:
    run.event("submit", 0)
    run.event("start", 10, nodes="n1")
    run.event("stop", 50, reason="time limit")
    assert status_at(run, 51).state == "running"
    run.event("end", 60, status=0, reason="stopped", checkpoint="tune-000004", progress=True)
    assert (status_at(run, 61).state, status_at(run, 61).reason) == ("stopped", "")
    run.event("requeue", 61, exclude="")
    status = status_at(run, 62)
    assert status.state == "requeued"
    assert (status.attempts[0].outcome, status.attempts[0].cause) == ("stopped", "time limit")


def test_bad_nodes_and_giving_up(run: RunFiles) -> None:
    run.event("submit", 0, script="jobs/a b.sbatch")
    run.event("start", 10, nodes="n1,n2")
    run.event("bad_node", 20, node="n2", reason="7 GPUs, 8 asked for")
    run.event("end", 21, status=1, reason="preflight", detail="7 GPUs, 8 asked for", checkpoint="", progress=False)
    run.event("give_up", 22, reason="every node failed")
    (run.folder / "slurm" / "excluded").write_text("n2\nn9\n")
    status = status_at(run, 23)
    assert (status.state, status.reason, status.excluded) == ("gave up", "every node failed", ("n2", "n9"))
    assert (status.attempts[0].outcome, status.attempts[0].cause) == ("preflight", "n2: 7 GPUs, 8 asked for")
    assert any("`moe-lvlm submit 'jobs/a b.sbatch'` goes on from the beginning" in hint for hint in status.hints)
    run.event("submit", 100, script="jobs/a b.sbatch", job="18")
    assert status_at(run, 101).state == "queued"


def test_a_hang_says_where_and_who(run: RunFiles) -> None:
    run.event("start", 10, nodes="n1,n2")
    run.log("world", 12, world_size=2, hosts=["n1", "n2"], job="17", attempt=1)
    run.stage("tune", 20, index=0, steps=100)
    run.log("hang", 1900, phase="save", stage="tune", step=20, seconds=1800, silent=[1])
    run.event("end", 1905, status=85, reason="hang", rank=0, node="n1", detail="n1: task 0: Exited with exit code 85")
    hangs = run.folder / "hangs"
    hangs.mkdir()
    for start in ("20261126T100000Z", "20261127T100000Z"):
        (hangs / f"{start}-rank-000.txt").write_text("rank: 0\n")
    (attempt,), hints = status_at(run, 1906).attempts, status_at(run, 1906).hints
    assert (attempt.outcome, attempt.status, attempt.rank) == ("hang", 85, 0)
    assert attempt.cause == "no progress in phase save after step 20 of tune; silent: rank 1"
    assert any(f"{hangs}/20261127T100000Z-*" in hint for hint in hints)


@pytest.mark.parametrize(
    ("reason", "state"),
    [("cancelled", "cancelled"), ("user error", "failed"), ("crash", "failed"), ("something new", "failed")],
)
def test_ends_that_nothing_follows(run: RunFiles, reason: str, state: str) -> None:
    run.event("start", 10, nodes="n1")
    run.event("end", 60, status=1, reason=reason)
    assert status_at(run, 61).state == state
    assert status_at(run, 61).attempts[0].outcome == reason


def test_a_chain_of_jobs(run: RunFiles) -> None:
    run.event("submit", 0, job="17")
    run.event("submit", 1, job="18")
    run.event("start", 10, nodes="n1", job="17")
    assert status_at(run, 11).state == "running"
    run.event("end", 60, status=0, reason="done", job="17")
    assert status_at(run, 61).state == "queued"
    run.event("start", 70, nodes="n1", job="18", attempt=2)
    assert status_at(run, 71).state == "running"
    run.event("end", 80, status=0, reason="done", job="18", attempt=2)
    assert status_at(run, 81).state == "stopped"


def test_jobs_behind_one_that_failed_do_not_count_as_queued(run: RunFiles) -> None:
    run.event("submit", 0, job="17")
    run.event("submit", 1, job="18")
    run.event("start", 10, nodes="n1", job="17")
    run.event("end", 60, status=0, reason="stopped", job="17")  # asked not to be queued again
    assert status_at(run, 61).state == "stopped"


def test_a_task_of_an_array(run: RunFiles) -> None:
    run.event("submit", 0, job="17")
    run.event("start", 10, nodes="n1", job="17_3")
    run.event("end", 60, status=0, reason="done", job="17_3")
    assert status_at(run, 61).state == "stopped"


def test_done(run: RunFiles) -> None:
    run.event("submit", 0)
    run.event("start", 10, nodes="n1")
    run.stage("tune", 20, index=0, steps=100)
    train(run, first=0, last=100, at=20)
    run.stage("sparse", 130, index=1, steps=50)
    run.step("sparse", 140, step=50, global_step=150)
    run.log("done", 150, seconds=130.0)
    (run.folder / "DONE").touch()
    status = status_at(run, 10**7)
    assert (status.state, status.since, status.hints) == ("done", START + 150, ())
    assert status.attempts[0].outcome == "done"
    assert (status.progress.step, status.progress.steps, status.progress.run_seconds) == (150, 150, None)


def test_the_same_command_after_the_end(run: RunFiles) -> None:
    run.stage("tune", 20, index=0, steps=100)
    train(run, first=0, last=100, at=20)
    run.log("done", 150, seconds=130.0)
    (run.folder / "DONE").touch()
    run.log("resume", 1000, path="tune-000100", global_step=100)
    status = status_at(run, 2000)
    assert status.state == "done"
    assert [(one.number, one.outcome, one.lost_steps) for one in status.attempts] == [(1, "done", 0), (2, "done", None)]


def test_silence(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    assert status_at(run, 1790).state == "running"  # loads a model
    assert status_at(run, 1810).state == "silent"
    train(run, first=0, last=30, at=0, seconds=60.0)
    run.log("checkpoint", 181, path="x", seconds=50.0, bytes=1)
    # ten times the minute between logged steps, and three saves
    assert status_at(run, 181 + 740).state == "running"
    status = status_at(run, 181 + 760)
    assert (status.state, status.since, status.silence_limit) == ("silent", START + 181, 750.0)
    run.rank_log(5, "still here\n", at=900)
    assert status_at(run, 181 + 760).state == "running"


def test_the_watchdogs_limit_is_waited_for_before_the_first_step(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "run", train={"hang_timeout": 7200})
    run.event("start", 0, nodes="n1")
    assert status_at(run, 7100).state == "running"
    assert status_at(run, 7300).state == "silent"


def test_stopped_without_slurm(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    train(run, first=0, last=20, at=0)
    run.log("stopped", 22, path="tune-000020")
    status = status_at(run, 10**6)
    assert (status.state, status.since) == ("stopped", START + 22)
    assert [one.outcome for one in status.attempts] == ["stopped"]
    assert "the command that it was started with goes on" in status.hints[0]


HOLD_LOCK = """
import sys
from pathlib import Path
from moe_lvlm.training.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_tells_who_lives(run: RunFiles) -> None:
    command = [sys.executable, "-c", HOLD_LOCK, str(run.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert status_at(run, 10).state == "running"  # nothing is logged yet
        run.stage("tune", 20, index=0, steps=100)
        run.step("tune", 30, step=1, global_step=1)
        assert status_at(run, 31).state == "running"
        holder.kill()
    status = status_at(run, 31)
    assert (status.state, status.attempts[0].outcome) == ("failed", "lost")
    (run.folder / LOCK).write_text(f"1 on {socket.gethostname()}x\n")  # of a machine that we cannot ask
    assert status_at(run, 31).state == "running"


def test_the_end_of_a_stage_without_slurm(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    train(run, first=0, last=100, at=0)
    (run.folder / LOCK).write_text(f"1 on {socket.gethostname()}\n")
    status = status_at(run, 110)
    assert (status.state, status.attempts[0].outcome) == ("stopped", "stage done")


def test_training_by_hand_beside_jobs(run: RunFiles) -> None:
    run.event("start", 10, nodes="n1")
    run.log("world", 12, world_size=1, hosts=["n1"], job="17", attempt=1)
    run.stage("tune", 20, index=0, steps=100)
    run.event("end", 60, status=0, reason="cancelled")
    run.log("world", 500, world_size=1, hosts=["laptop"])
    run.stage("tune", 501, index=0, steps=100)
    status = status_at(run, 502)
    assert status.state == "running"
    assert [(one.number, one.job, one.nodes, one.outcome) for one in status.attempts] == [
        (1, "17", "n1", "cancelled"),
        (None, "", "laptop", "running"),
    ]


def test_logs_of_older_versions_are_joined_by_time(run: RunFiles) -> None:
    run.event("start", 10, nodes="n1")
    run.stage("tune", 20, index=0, steps=100)
    train(run, first=0, last=10, at=20)
    run.event("end", 60, status=1, reason="crash")
    run.event("start", 100, nodes="n1", attempt=2)
    run.stage("tune", 120, index=0, steps=100)  # there was no checkpoint: from the beginning
    train(run, first=0, last=20, at=120)
    attempts = status_at(run, 150).attempts
    assert [(one.number, one.first_step, one.last_step, one.lost_steps) for one in attempts] == [
        (1, 0, 10, 10),
        (2, 0, 20, None),
    ]


def test_a_run_that_waits_in_the_queue(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "run")
    (run.folder / "slurm").mkdir()
    (run.folder / "recipe.yaml").rename(run.folder / "slurm" / "recipe.yaml")
    run.log_path.unlink()
    run.event("submit", 0)
    status = status_at(run, 10)
    assert (status.state, status.since, status.progress.steps, status.attempts) == ("queued", START, 150, ())


def test_lines_that_cannot_be_read_are_named(run: RunFiles) -> None:
    run.stage("tune", 0, index=0, steps=100)
    with run.log_path.open("ab") as file:
        file.write(b"\0\0\0\0\n[1]\n")
    run.step("tune", 10, step=10, global_step=10)
    status = status_at(run, 11)
    assert status.progress.step == 10
    assert status.problems == (f"{run.log_path}: 2 lines could not be read",)


@pytest.mark.parametrize(
    "text", ["stages: [\n", "- a\n", "stages: 5\ntrain: x\n", "stages: [1, {name: [2], steps: a}]\n", ""]
)
def test_recipes_that_make_no_sense(run: RunFiles, text: str) -> None:
    (run.folder / "recipe.yaml").write_text(text)
    run.stage("tune", 0, index=0, steps=100)
    run.step("tune", 10, step=10, global_step=10)
    stages = {stage.name: (stage.step, stage.steps) for stage in status_at(run, 11).progress.stages}
    assert stages["tune"] == (10, 100)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text("name: a\n")  # a recipe, not a run
    with pytest.raises(ValueError, match=r"absent: no such folder"):
        find_runs([tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"empty: not a run's folder .* recipe.yaml with log.jsonl"):
        find_runs([tmp_path / "empty"])
    for name in ("b", "a", ".hidden"):
        RunFiles(tmp_path / "sweep" / name)
    RunFiles(tmp_path / "sweep" / "group" / "c")
    sweep = tmp_path / "sweep"
    assert find_runs([sweep, sweep / "a"]) == [sweep / "a", sweep / "b", sweep / "group" / "c"]
    with pytest.raises(ValueError, match="sweep: holds runs but is none"):
        read_status(sweep)


def full_run(folder: Path) -> RunFiles:
    """A run that has every kind of line."""
    run = RunFiles(folder)
    run.event("submit", 0, script="job.sbatch")
    run.event("start", 10, nodes="n1", checkpoint="")
    run.event("bad_node", 11, node="n1", reason='says "no"')
    run.event("lost", 20)
    run.event("start", 21, nodes="n1", attempt=2)
    run.event("stop", 30, reason="time limit", attempt=2)
    run.event("end", 31, status=0, reason="stopped", rank=1, node="n1", detail="é", attempt=2, progress=True)
    run.event("requeue", 32, exclude="", attempt=2)
    run.event("give_up", 33, reason="why", attempt=2)
    run.event("unheard of", 34, attempt=[2])
    run.log("world", 11, world_size=1, hosts=["n1"], job="17", attempt=1)
    run.stage("tune", 12, index=0, steps=100)
    run.step("tune", 13, step=1, global_step=1, expert_load={"0": {"language": [1, 2], "vision": [3, 4]}})
    run.log("skipped", 14, step=2, reason="x")
    run.log("checkpoint", 15, path="x", seconds=1.0, bytes=5)
    run.log("resume", 22, path="x", global_step=1)
    run.stage("tune", 23, index=0, steps=100, step=1)
    run.step("tune", 24, step=2, global_step=2, dropped={"0": {"language": [1, 2], "vision": [3, 4]}})
    run.log("hang", 25, phase="save", stage="tune", step=2, silent=[1])
    run.log("stopped", 31, path="x")
    run.log("unheard of", 32, values={})
    return run


def show(status: RunStatus) -> None:
    """In every form."""
    json.dumps(status.to_json(), allow_nan=False)
    console = Console(file=io.StringIO(), width=100)
    console.print(status_page(status))
    console.print(status_table([status, status]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFiles, bytes, bytes]:
    run = full_run(tmp_path_factory.mktemp("whole") / "run")
    return run, run.log_path.read_bytes(), run.events_path.read_bytes()


@settings(deadline=None, max_examples=60)
@given(share=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_no_truncation_raises(whole: tuple[RunFiles, bytes, bytes], share: tuple[float, float]) -> None:
    run, log, events = whole
    run.log_path.write_bytes(log[: round(share[0] * len(log))])
    run.events_path.write_bytes(events[: round(share[1] * len(events))])
    show(status_at(run, 40))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "language", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_value_raises(whole: tuple[RunFiles, bytes, bytes], data: st.DataObject) -> None:
    """Values of any kind, in place of some of those that were expected."""
    run, log, events = whole
    for path, content in ((run.log_path, log), (run.events_path, events)):
        records = [json.loads(line) for line in content.splitlines()]
        for record in data.draw(st.lists(st.sampled_from(records), max_size=4)):
            record[data.draw(st.sampled_from(sorted(record)))] = data.draw(ANYTHING)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    show(status_at(run, 40))
