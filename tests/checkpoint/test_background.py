"""Saves beside training: what is saved is the moment of the call, errors come back, memory is bounded."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_lvlm.checkpoint import files
from moe_lvlm.checkpoint.background import CheckpointWriter
from moe_lvlm.checkpoint.fragments import LiveTraining, live_model
from moe_lvlm.checkpoint.ranks import SaveError, SingleRank
from moe_lvlm.checkpoint.save import PreparedSave, SaveReport, prepare_save
from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.checkpoint.verify import verify


@pytest.fixture
def training() -> LiveTraining:
    return live_model(nn.Linear(8, 4, bias=False))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are not written before it is set."""
    event = threading.Event()
    write = files.HashedFile.write

    def waiting(self: Any, data: Any) -> None:
        assert event.wait(20)
        write(self, data)

    monkeypatch.setattr(files.HashedFile, "write", waiting)
    return event


def prepare(folder: Path, training: LiveTraining, step: int) -> PreparedSave:
    state = {"global_step": step}
    return prepare_save(folder, f"c{step}", training, config={}, state=state, rng={}, ranks=SingleRank(), log=print)


def writer(max_bytes: int = 10**6, log: Any = print) -> CheckpointWriter:
    return CheckpointWriter(ranks=SingleRank(), background_ranks=SingleRank(), max_bytes=max_bytes, log=log)


def finish(one: CheckpointWriter, prepared: PreparedSave, done: Any, *, at_once: bool = False) -> None:
    one.finish(prepared, at_once=at_once, keep_last=None, protect=(), done=done)


def test_training_goes_on_and_the_saved_moment_stays(
    tmp_path: Path, training: LiveTraining, gate: threading.Event
) -> None:
    saves, reports = writer(), []
    before = training.model.weight.detach().clone()
    finish(saves, prepare(tmp_path, training, 1), reports.append)
    with torch.no_grad():
        training.model.weight.fill_(7)  # a step, while nothing is written yet
    assert not reports and not (tmp_path / "c1").exists()
    gate.set()
    saves.wait()
    assert [report.path for report in reports] == [tmp_path / "c1"]
    assert torch.equal(open_source(tmp_path / "c1").read("weight"), before)
    assert verify(tmp_path / "c1") == []
    saves.wait()  # nothing is under way


def test_one_at_a_time(tmp_path: Path, training: LiveTraining) -> None:
    """The second save waits for the first, and a save at once waits for both."""
    saves, order = writer(), []
    for step in (1, 2, 3):
        saves.wait()
        finish(saves, prepare(tmp_path, training, step), order.append, at_once=step == 3)
    assert [report.path.name for report in order] == ["c1", "c2", "c3"]
    assert (tmp_path / "latest").read_text() == "c3\n"


def test_a_failure_is_raised_at_the_next_call(
    tmp_path: Path, training: LiveTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = writer()
    finish(saves, prepare(tmp_path, training, 1), print)
    saves.wait()

    def full(self: Any, data: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.HashedFile, "write", full)
        finish(saves, prepare(tmp_path, training, 2), print)
        with pytest.raises(SaveError, match=r"failed to write: rank 0: OSError.*No space left"):
            saves.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c1", "latest"]
    finish(saves, prepare(tmp_path, training, 3), print)  # with room again it goes on
    saves.wait()
    assert verify(tmp_path / "c3") == []


def test_a_share_above_the_limit_is_written_at_once(tmp_path: Path, training: LiveTraining) -> None:
    said: list[str] = []
    reports: list[SaveReport] = []
    finish(writer(max_bytes=8 * 4 * 4 - 1, log=said.append), prepare(tmp_path, training, 1), reports.append)
    assert [report.path.name for report in reports] == ["c1"]
    assert "c1: a rank's share is 128 bytes" in said[0] and "127" in said[0]
