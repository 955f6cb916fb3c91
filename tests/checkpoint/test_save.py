"""Saving and judging a plain model's checkpoints: what is written, what damage is seen, what a failure leaves."""

from __future__ import annotations

import errno
import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file
from torch import nn

from moe_lvlm.checkpoint import files
from moe_lvlm.checkpoint.folder import list_checkpoints, read_latest, temporary_path
from moe_lvlm.checkpoint.fragments import LiveTraining, live_model
from moe_lvlm.checkpoint.layout import CheckpointError
from moe_lvlm.checkpoint.ranks import SaveError, SingleRank
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.restore import restore_training_state
from moe_lvlm.checkpoint.rng import capture_rng, restore_rng
from moe_lvlm.checkpoint.save import Owned, choose_writers, save_checkpoint
from moe_lvlm.checkpoint.verify import newest_valid, verify
from tests.checkpoint import trainings
from tests.checkpoint.conftest import FailWrite
from tests.checkpoint.trainings import step, trained_by_adam


def stepped(seed: int = 0, steps: int = 3) -> LiveTraining:
    """So small that damage to any byte of it can be tried."""
    return trainings.stepped(seed, steps, inputs=4)


def save_one(folder: Path, name: str, training: LiveTraining, global_step: int, **options: Any) -> Any:
    arguments: dict[str, Any] = {"ranks": SingleRank(), "log": print, "rng": capture_rng(), **options}
    return save_checkpoint(
        folder, name, training, config={"model_type": "x"}, state={"global_step": global_step}, **arguments
    )


def test_a_resumed_run_equals_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = stepped()
    report = save_one(tmp_path, "tune-000003", unbroken, 3)
    losses = step(unbroken, 2)

    resumed = stepped(seed=9, steps=1)
    checkpoint = Checkpoint(tmp_path / "tune-000003")
    restore_training_state(resumed, checkpoint)
    generators = checkpoint.rng(0)
    assert generators is not None
    restore_rng(generators)
    assert step(resumed, 2) == losses
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name

    assert report.path == tmp_path / "tune-000003"
    assert report.bytes == sum(file.stat().st_size for file in report.path.iterdir())
    assert (tmp_path / "latest").read_text() == "tune-000003\n"
    assert checkpoint.config == {"model_type": "x"}
    assert checkpoint.rng(1) is None


def test_files_are_plain_safetensors_and_the_manifest_is_right(tmp_path: Path) -> None:
    training = stepped()
    path = save_one(tmp_path, "a", training, 3).path
    stored = load_file(path / "rank-00000.safetensors")
    state = training.model.state_dict()
    assert torch.equal(stored["0.weight:master:0"].view(5, 4), state["0.weight"])
    assert torch.equal(stored["0.bias:weight:0"], state["0.bias"])
    assert torch.equal(stored["1.running_var:weight:0"], state["1.running_var"])
    manifest = json.loads((path / "manifest.json").read_text())["files"]
    assert set(manifest) | {"manifest.json"} == {file.name for file in path.iterdir()}
    for name, record in manifest.items():
        data = (path / name).read_bytes()
        assert record == {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    assert json.loads((path / "index.json").read_text())["tensors"]["0.weight"]["exp_avg"]["step"] == 3.0


def test_random_generators_go_on(tmp_path: Path) -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.gauss(0, 1), np.random.normal()  # both leave a second normal number cached
    save_one(tmp_path, "a", stepped(), 1, rng=capture_rng())

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(1).item()]

    saved = Checkpoint(tmp_path / "a").rng(0)
    assert saved is not None
    restore_rng(saved)
    expected = draw()
    draw()
    restore_rng(saved)
    assert draw() == expected


def test_a_model_that_was_never_stepped_has_no_moments(tmp_path: Path) -> None:
    save_one(tmp_path, "a", stepped(steps=0), 0)
    resumed = stepped(seed=1, steps=2)
    restore_training_state(resumed, Checkpoint(tmp_path / "a"))
    assert resumed.optimizer is not None and not any(resumed.optimizer.state.values())


def test_another_model_is_refused(tmp_path: Path) -> None:
    save_one(tmp_path, "a", stepped(), 1)
    checkpoint = Checkpoint(tmp_path / "a")
    thawed = stepped().model.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"1 tensors differ: 0\.bias \(here trained, there frozen\)"):
        restore_training_state(trained_by_adam(thawed), checkpoint)
    wider = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    wider.get_parameter("0.bias").requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"shape \(5, 4\), the model's is \(6, 4\)"):
        restore_training_state(trained_by_adam(wider), checkpoint)
    deeper = nn.Sequential(*stepped().model.children(), nn.Linear(2, 2, bias=False))
    with pytest.raises(CheckpointError, match=r"1 tensors differ: 3\.weight \(here trained, there absent\)"):
        restore_training_state(trained_by_adam(deeper), checkpoint)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "max_exp_avg_sq"),
    ],
)
def test_other_optimizers_are_refused(tmp_path: Path, optimizer: Callable[..., Any], message: str) -> None:
    model = nn.Linear(4, 2)
    training = live_model(model, optimizer(model.parameters()))
    step(training, 1)
    with pytest.raises(SaveError, match=message):
        save_one(tmp_path, "a", training, 1)
    with pytest.raises(ValueError, match=r"trained in torch\.bfloat16 without float32 masters"):
        live_model(model.bfloat16(), optimizer(model.parameters()))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for number in (1, 2, 3):
        save_one(folder, f"c{number}", stepped(), number)
    return folder


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [damage_byte, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rng-00000.safetensors", "index.json", "state.json"])
def test_damage_is_seen_and_passed_over(three: Path, tmp_path: Path, damage: Callable[[Path], None], file: str) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "c3" / file)
    problems = verify(tmp_path / "c3")
    assert len(problems) == 1 and file in problems[0]
    said: list[str] = []
    assert newest_valid(tmp_path, said.append) == tmp_path / "c2"
    assert len(said) == 1 and "c3: damaged" in said[0] and file in said[0]


def test_without_manifest_or_latest(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_valid(tmp_path / "missing", said.append) is None
    for number in (10, 9):  # names sort the other way round
        save_one(tmp_path, f"c{number}", stepped(), number)
    assert newest_valid(tmp_path, said.append) == tmp_path / "c9"  # the latest, not the greatest step
    (tmp_path / "latest").write_text("../c9")
    assert newest_valid(tmp_path, said.append) == tmp_path / "c10"
    assert said == []
    (tmp_path / "c10" / "manifest.json").unlink()
    (tmp_path / "latest").write_text("c10")
    assert newest_valid(tmp_path, said.append) == tmp_path / "c9"
    assert "named by `latest`" in said[0]


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    path = save_one(tmp_path, "a", stepped(), 1).path
    index = json.loads((path / "index.json").read_text())
    index["tensors"]["0.bias"]["weight"]["ranges"][0][3] = "no such key"
    rewrite(path, "index.json", index)
    assert "no such key is None" in verify(path)[0]
    index["tensors"]["0.bias"]["weight"]["ranges"] = [[0, 4, "rank-00000.safetensors", "0.bias:weight:0"]]
    rewrite(path, "index.json", index)
    assert "no file has [4, 5)" in verify(path)[0]
    with pytest.raises(CheckpointError, match=r"no file has \[4, 5\)"):
        Checkpoint(path)
    index["tensors"]["0.bias"]["weight"]["ranges"] = [[0, 5, "../../secret.safetensors", "x"]]
    rewrite(path, "index.json", index)
    assert "allowed are names like" in verify(path)[0]
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"size": 1, "xxh3_128": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "names '../../secret'" in verify(path)[0]


def rewrite(path: Path, file: str, data: Any) -> None:
    """Change a file and make the manifest say so."""
    (path / file).write_text(json.dumps(data))
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / file).read_bytes()
    manifest["files"][file] = {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    training = stepped()
    training.model.get_parameter("2.weight").data[0, 0] = float("nan")
    path = save_one(tmp_path, "a", training, 1).path
    assert verify(path) == []
    assert "2.weight (master) holds values that are not finite" in verify(path, is_finite_checked=True)[0]


def test_retention_keeps_the_last_and_the_protected(tmp_path: Path) -> None:
    for number in range(1, 6):
        save_one(tmp_path, f"c{number}", stepped(), number, keep_last=2, protect={"c1"})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["c5", "c4", "c1"]


def test_leftovers_go_and_other_files_stay(tmp_path: Path) -> None:
    save_one(tmp_path, "c1", stepped(), 1)
    half_written = temporary_path(tmp_path, "c2")
    half_written.mkdir()
    (half_written / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "c1").rename(tmp_path / ".c1.old")  # killed between the two renames of a replacement
    foreign = tmp_path / ".mine.tmp"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    assert newest_valid(tmp_path, print) is None  # a reader must not touch what may be a save under way
    assert half_written.exists()
    assert newest_valid(tmp_path, print, is_owner=True) == tmp_path / "c1"
    save_one(tmp_path, "c2", stepped(), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "c1", "c2", "latest"]


def test_a_name_can_be_saved_again(tmp_path: Path) -> None:
    save_one(tmp_path, "c1", stepped(steps=1), 1)
    damage_byte(tmp_path / "c1" / "rank-00000.safetensors")
    save_one(tmp_path, "c1", stepped(steps=2), 2)
    assert verify(tmp_path / "c1") == []
    assert Checkpoint(tmp_path / "c1").state["global_step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c1", "latest"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path, fail_write: FailWrite, code: int) -> None:
    """The k-th write fails, for every k until a save comes through."""
    save_one(tmp_path, "c1", stepped(), 1)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c1").iterdir()}
    for failing in range(1, 200):
        fail_write(failing, code)
        try:
            save_one(tmp_path, "c2", stepped(), 2)
        except SaveError as error:
            assert "injected" in str(error) and "rank 0" in str(error)
        else:
            break
        if read_latest(tmp_path) == "c2":  # the failure came after the rename, in writing `latest` itself
            pytest.fail("latest was replaced by a save that failed")
        assert verify(tmp_path / "c1") == []
        assert not temporary_path(tmp_path, "c2").exists()
    assert failing > 10
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c1").iterdir()}
    assert read_latest(tmp_path) == "c2"


def test_a_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_one(tmp_path, "c1", stepped(), 1)
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(SaveError, match=r"1,000 bytes free, [\d,]+ needed"):
        save_one(tmp_path, "c2", stepped(), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c1", "latest"]


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.world_size, self._barrier, self._slots = rank, world_size, barrier, slots

    def all_gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(timeout=20)
        values = list(self._slots)
        self._barrier.wait(timeout=20)
        return values


def save_as(folder: Path, world_size: int, failing_rank: int | None) -> list[Any]:
    barrier, slots = threading.Barrier(world_size), [None] * world_size
    results: list[Any] = [None] * world_size
    trainings = [stepped() for _ in range(world_size)]

    def run(rank: int) -> None:
        training = trainings[rank]
        if rank == failing_rank:
            training.model.register_buffer("alias", torch.ones(2, 3).t())  # not contiguous: this rank cannot go on
        try:
            ranks = ThreadRanks(rank, world_size, barrier, slots)
            results[rank] = save_one(folder, "two", training, 1, ranks=ranks, rng={})
        except SaveError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    reports = save_as(tmp_path, 2, failing_rank=None)
    assert [report.bytes for report in reports] == [sum(f.stat().st_size for f in reports[0].path.iterdir())] * 2
    assert verify(tmp_path / "two") == []
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "two" / f"rank-0000{r}.safetensors").values()) for r in (0, 1)]
    largest = 5 * 4 * 4
    assert abs(sizes[0] - sizes[1]) <= largest


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    save_one(tmp_path, "one", stepped(), 1)
    results = save_as(tmp_path, 3, failing_rank=1)
    for result in results:
        assert isinstance(result, SaveError)
        assert "rank 1: ValueError: alias: strides" in str(result)
    assert read_latest(tmp_path) == "one"
    assert verify(tmp_path / "one") == []


def test_writers_are_balanced_among_those_that_hold_a_fragment() -> None:
    # by hand: 8 goes to rank 1 (rank 0 has 5 already), 4 to rank 0 (5 against 8), 2 only rank 1 holds
    big, middle, small = (Owned(name, "weight", 0, n, n) for name, n in (("a", 8), ("b", 4), ("c", 2)))
    writers, loads = choose_writers([[big, middle], [big, middle, small]], [5, 0])
    assert writers == {big: 1, middle: 0, small: 1}
    assert loads == [9, 10]


def test_a_moved_checkpoint_opens(tmp_path: Path) -> None:
    path = save_one(tmp_path / "old", "a", stepped(), 1).path
    shutil.move(path, tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere") == []
