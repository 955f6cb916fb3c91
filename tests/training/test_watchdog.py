"""A run that hangs ends, and leaves word of where; a run that does not hang is left alone."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.parallel.process_group import host_name
from moe_lvlm.training import watchdog
from moe_lvlm.training.hangs import Hang, HangFolder, in_words
from moe_lvlm.training.watchdog import Beat, IdleTime, Watchdog
from tests.training.conftest import OVERRIDES
from tests.training.launching import TIME_LIMIT, Job, Server, assert_no_orphans, events, has_step, living

LIMIT = 6  # seconds; longer than any step of the tiny run takes on a loaded machine
HANG = 85
HERE = host_name()


def wait_for_end(pid: int) -> None:
    """Wait until a process is gone."""
    limit = time.monotonic() + TIME_LIMIT
    while list(living([pid])):
        assert time.monotonic() < limit, "the process did not end"
        time.sleep(0.05)


def end_stopped(job: Job, rank: int) -> None:
    """Wait for the end of the other rank of two, which is to be a hang's, and kill the stopped one."""
    wait_for_end(job.pids[1 - rank])
    os.kill(job.pids[rank], signal.SIGKILL)
    expected = [HANG, HANG]
    expected[rank] = -signal.SIGKILL
    assert job.wait() == expected, job.output


def summary(run: Path) -> dict[str, Any]:
    (path,) = (run / "hangs").glob("*-summary.json")
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def stacks(run: Path, rank: int) -> str:
    (path,) = (run / "hangs").glob(f"*-rank-{rank:03d}.txt")
    return path.read_text()


@pytest.mark.distributed
def test_a_rank_stops_in_a_step(server: Server, recipe: Path, tmp_path: Path) -> None:
    """Before that all ranks stop for longer than the limit and go on, as in a suspended job: no hang."""
    run = tmp_path / "run"
    settings = ["stages.0.steps=100000", "train.checkpoint.every=0", f"train.hang_timeout={LIMIT}"]
    job = server.start(["train", str(recipe), *settings, f"output_dir={run}"])
    job.wait_until(has_step(run, "tune", 1))
    job.signal(signal.SIGSTOP)
    done = events(run).named("step")[-1]["step"]
    time.sleep(1.5 * LIMIT)
    job.signal(signal.SIGCONT)
    job.wait_until(has_step(run, "tune", done + 5))

    os.kill(job.pids[1], signal.SIGSTOP)
    end_stopped(job, 1)
    said = summary(run)
    (dumped,) = said["dumped"]
    last = events(run).named("step")[-1]["step"]
    assert (dumped["rank"], dumped["host"], dumped["phase"], dumped["stage"]) == (0, HERE, "step", "tune")
    assert dumped["step"] == last
    assert said["silent"] == [{"rank": 1, "host": HERE}]
    assert (said["world_size"], said["limit"]) == (2, LIMIT)
    assert f"rank 0 on {HERE} hangs: no progress for" in job.output
    place = f"phase step, stage tune, after step {last}"
    assert f"hang after {LIMIT} s: rank 0 in {place}; silent (stopped or dead): rank 1 on {HERE}\n" in job.output
    text = stacks(run, 0)
    assert text.startswith(f"rank: 0\nhost: {HERE}\nphase: step\nstage: tune\nstep: {last}\nseconds: ")
    assert "moe_lvlm/training/step.py" in text
    (event,) = events(run).named("hang")
    assert (event["phase"], event["step"], event["silent"]) == ("step", last, [1])


@pytest.mark.distributed
def test_a_rank_stops_in_a_save(server: Server, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"train.hang_timeout={LIMIT}", f"output_dir={run}"]
    job = server.start(["train_and_stop", "process", "1", "2", "train", str(recipe), *OVERRIDES, *settings])
    end_stopped(job, 1)
    assert {(one["rank"], one["phase"]) for one in summary(run)["dumped"]} == {(0, "save")}
    assert [one["rank"] for one in summary(run)["silent"]] == [1]
    assert "moe_lvlm/checkpoint/save.py" in stacks(run, 0)


@pytest.mark.distributed
def test_a_save_in_the_background_hangs(server: Server, recipe: Path, tmp_path: Path) -> None:
    """Training goes on until the next save waits for it."""
    run = tmp_path / "run"
    settings = [f"train.hang_timeout={LIMIT}", "train.checkpoint.background=true", f"output_dir={run}"]
    job = server.start(["train_and_stop", "thread", "1", "2", "train", str(recipe), *OVERRIDES, *settings])
    assert job.wait() == [HANG, HANG], job.output
    places = {(one["rank"], one["phase"], one["step"]) for one in summary(run)["dumped"]}
    assert places == {(0, "save", 2), (1, "save", 2)}
    assert "sync_to_a_dead_disk" in stacks(run, 1)


@pytest.mark.distributed
def test_a_rank_never_joins(server: Server, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"train.hang_timeout={LIMIT}", f"output_dir={run}"]
    job = server.start(["train_and_stop", "process", "1", "0", "train", str(recipe), *settings])
    end_stopped(job, 1)
    assert {(one["rank"], one["phase"]) for one in summary(run)["dumped"]} == {(0, "start")}
    assert summary(run)["silent"] == [{"rank": 1, "host": None}]
    assert "join_world" in stacks(run, 0)


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_rank_hangs_in_its_data(num_workers: int, server: Server, recipe: Path, tmp_path: Path) -> None:
    """Both ranks end as hanging, and nothing is left of them; the culprit's stacks show what it does."""
    run = tmp_path / "run"
    settings = [f"train.hang_timeout={LIMIT}", f"data.num_workers={num_workers}", f"output_dir={run}"]
    job = server.start(["train_with_sleeps", "1", "5", "1000", "train", str(recipe), *OVERRIDES, *settings])
    assert job.wait() == [HANG, HANG], job.output
    assert {(one["rank"], one["phase"]) for one in summary(run)["dumped"]} == {(0, "step"), (1, "step")}
    assert summary(run)["silent"] == []
    assert "read_from_a_slow_disk" in (job.output if num_workers else stacks(run, 1))
    assert "read_from_a_slow_disk" not in stacks(run, 0)
    assert_no_orphans(job)


@pytest.mark.distributed
def test_slow_steps_are_no_hang(server: Server, recipe: Path, tmp_path: Path) -> None:
    """The run takes longer than the limit, no step does: eight of eight samples, two ranks, 0.3 s a sample."""
    run = tmp_path / "run"
    settings = [f"train.hang_timeout={LIMIT}", f"output_dir={run}"]
    server.run(["train_with_sleeps", "any", "0", "0.3", "train", str(recipe), *OVERRIDES, *settings])
    assert (run / "DONE").exists()
    assert not (run / "hangs").exists()
    steps = events(run).named("step")
    assert steps[-1]["time"] - steps[0]["time"] > LIMIT  # else this has shown nothing


@pytest.mark.distributed
def test_a_process_that_cannot_run_its_watchdog(server: Server, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"train.hang_timeout={LIMIT}", f"output_dir={run}"]
    job = server.start(["train_and_hold_the_lock", "train", str(recipe), *settings], world=1)
    assert job.wait() == [1], job.output
    assert f"Timeout (0:00:{LIMIT + 1:02d})!" in job.output
    assert "read_with_the_lock" in job.output


def test_time_without_a_beat() -> None:
    idle = IdleTime(tick=1.0, now=100.0)
    first, second = Beat("step", "tune", 3), Beat("step", "tune", 3)
    assert idle.look(first, now=101.0) == 0.0
    assert idle.look(first, now=102.0) == 1.0
    assert idle.look(first, now=103.5) == 2.5
    assert idle.look(first, now=903.5) == 4.5  # the process had stopped: two ticks
    assert idle.look(first, now=904.5) == 5.5
    assert idle.look(second, now=905.5) == 0.0  # another beat, if of the same place
    assert idle.look(second, now=906.0) == 0.5


def hang(rank: int, **values: Any) -> Hang:
    return replace(Hang(rank=rank, host="n1", phase="step", stage="tune", step=7, seconds=30), **values)


def test_who_hangs_in_words() -> None:
    hosts = ["n1", "n1", "n1", "n2", "n2", "n2", "n3", "n3"]
    hangs = {rank: hang(rank, host=hosts[rank]) for rank in (0, 1, 2, 4)}
    hangs[1] = hang(1, phase="save")
    assert in_words(hangs, hosts) == (
        "rank 1 in phase save, stage tune, after step 7; ranks 0, 2, 4 in phase step, stage tune, after step 7; "
        "silent (stopped or dead): ranks 3, 5 on n2; silent (stopped or dead): ranks 6-7 on n3"
    )
    assert in_words({0: hang(0, phase="start", stage="", step=0)}, [None, None]) == (
        "rank 0 in phase start; silent (stopped or dead): rank 1"
    )


def test_files_of_one_start(tmp_path: Path) -> None:
    """2026-11-26T10:00:00Z; ranks that have not met began some seconds apart, an earlier start hung before."""
    start, limit = 1795687200.0, 30.0

    def leave(rank: int, *, start: float, written: float) -> HangFolder:
        files = HangFolder(tmp_path / "hangs", start=start, limit=limit)
        files.write_stacks(hang(rank))
        os.utime(files.stacks(rank), (written, written))
        return files

    earlier = leave(2, start=start - 60, written=start - 1)
    earlier.write_summary({2: hang(2)}, ["n1", "n1", "n9"])
    os.utime(earlier.summary, (start - 1, start - 1))
    leave(1, start=start + 2.5, written=start + limit + 3)
    ours = leave(0, start=start, written=start + limit)
    assert ours.stacks(0) == tmp_path / "hangs" / "20261126T100000Z-rank-000.txt"
    assert "test_files_of_one_start" in ours.stacks(0).read_text()
    assert ours.read() == {0: hang(0), 1: hang(1)}
    assert not ours.has_summary
    ours.write_summary(ours.read(), ["n1", "n1", "n9"])
    os.utime(ours.summary, (start + limit + 4, start + limit + 4))
    assert ours.has_summary
    assert sorted(path.name for path in (tmp_path / "hangs").iterdir()) == [
        "20261126T095900Z-rank-002.txt", "20261126T095900Z-summary.json", "20261126T100000Z-rank-000.txt",
        "20261126T100000Z-summary.json", "20261126T100002Z-rank-001.txt",
    ]  # fmt: skip
    values = json.loads((tmp_path / "hangs" / "20261126T100000Z-summary.json").read_text())
    assert values["silent"] == [{"rank": 2, "host": "n9"}]
    assert [one["rank"] for one in values["dumped"]] == [0, 1]


def test_stacks_that_cannot_be_written_go_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.0)
    (tmp_path / "hangs").write_text("no folder")
    Watchdog(tmp_path, limit=30)._report(hang(0))
    said = capfd.readouterr().err
    assert "rank-000.txt: not written (" in said
    assert "test_stacks_that_cannot_be_written_go_to_stderr" in said
    assert "hang after 30 s: rank 0 in phase step, stage tune, after step 7\n" in said


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    """Also where an exception ends the run."""
    with pytest.raises(RuntimeError, match="the run failed"), Watchdog(tmp_path, limit=1000) as watching:
        assert watching._thread.is_alive()
        raise RuntimeError("the run failed")
    assert not watching._thread.is_alive()
    with Watchdog(tmp_path, limit=0) as watching:
        assert not watching._thread.is_alive()
