"""Checkpoints that leave out what is not trained: what they hold, how they are read, and what a changed base leads to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lvlm.checkpoint.base import Base, BaseTensor, read_base, record_folder
from moe_lvlm.checkpoint.fragments import LiveTraining
from moe_lvlm.checkpoint.layout import CheckpointError
from moe_lvlm.checkpoint.ranks import SaveError, SingleRank
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.reshard import reshard
from moe_lvlm.checkpoint.restore import restore_training_state
from moe_lvlm.checkpoint.rng import capture_rng
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.checkpoint.source import BaseSource, open_source, source_files
from moe_lvlm.checkpoint.verify import newest_valid, verify
from tests.checkpoint.trainings import TRAIN_STATE, step, trained_by_adam

LEFT_OUT = {"1.weight": "there.weight", "1.bias": "there.bias"}
HELD = {"0.weight", "0.bias", "2.weight", "2.bias"}


def training(seed: int = 0, steps: int = 3) -> LiveTraining:
    """Three linears; the middle one is never trained."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 7), torch.nn.Linear(7, 2))
    model[1].requires_grad_(False)
    live = trained_by_adam(model)
    step(live, steps)
    return live


def base_of(live: LiveTraining, folder: Path) -> Base:
    """The middle linear in a folder of its own, beside a tensor that nobody wants."""
    folder.mkdir()
    state = live.model.state_dict()
    tensors = {theirs: state[name].clone() for name, theirs in LEFT_OUT.items()}
    save_file(tensors | {"other": torch.zeros(3)}, folder / "model.safetensors")
    return Base(
        folders=(record_folder(folder, source_files(folder, LEFT_OUT.values()), name="some/model"),),
        tensors={
            name: BaseTensor(0, theirs, torch.float32, tuple(state[name].shape)) for name, theirs in LEFT_OUT.items()
        },
    )


def save(directory: Path, live: LiveTraining, base: Base | None, name: str = "tune-000003") -> Path:
    return save_checkpoint(
        directory,
        name,
        live,
        config={"model_type": "x"},
        state=TRAIN_STATE,
        rng=capture_rng(),
        ranks=SingleRank(),
        log=print,
        base=base,
    ).path


@pytest.fixture
def saved(tmp_path: Path) -> tuple[LiveTraining, Path]:
    """A training, and its checkpoint."""
    live = training()
    return live, save(tmp_path / "checkpoints", live, base_of(live, tmp_path / "base"))


def test_what_is_left_out_is_not_there(saved: tuple[LiveTraining, Path]) -> None:
    live, path = saved
    stored = load_file(path / "rank-00000.safetensors")
    assert {key.split(":")[0] for key in stored} == HELD
    assert set(json.loads((path / "index.json").read_text())["tensors"]) == HELD
    assert Checkpoint(path).shapes() == {name: tuple(one.shape) for name, one in live.model.state_dict().items()}
    assert verify(path) == []
    assert newest_valid(path.parent, print) == path
    assert json.loads((path / "manifest.json").read_text())["format_version"] == 2


def test_a_checkpoint_that_holds_all_has_the_old_version(tmp_path: Path) -> None:
    path = save(tmp_path, training(), None)
    for file in ("manifest.json", "state.json", "index.json"):
        assert json.loads((path / file).read_text())["format_version"] == 1
    assert read_base(path) is None


def test_it_reads_as_the_whole_model(saved: tuple[LiveTraining, Path]) -> None:
    live, path = saved
    source = open_source(path)
    state = live.model.state_dict()
    assert sorted(source.names()) == sorted(state)
    for name, tensor in state.items():
        assert source.shape(name) == tuple(tensor.shape) and source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, 1, 2), tensor[1:2])


def test_flat_ranges_are_those_of_the_flattened_tensor(saved: tuple[LiveTraining, Path]) -> None:
    live, path = saved
    base = read_base(path)
    assert base is not None
    source = BaseSource(base, path)
    for name in LEFT_OUT:
        flat = live.model.state_dict()[name].reshape(-1)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(source.read_flat(name, start, stop), flat[start:stop])


def test_a_resumed_training_equals_the_unbroken_one(saved: tuple[LiveTraining, Path]) -> None:
    live, path = saved
    resumed = training(seed=9, steps=1)
    restore_training_state(resumed, Checkpoint(path))
    torch.manual_seed(1)
    losses = step(live, 2)
    torch.manual_seed(1)
    assert step(resumed, 2) == losses
    for name, tensor in live.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_types_of_the_run(tmp_path: Path) -> None:
    """A base in float32 of a run in bf16 gives bf16's values."""
    live = training()
    base = base_of(live, tmp_path / "base").to(torch.bfloat16)
    values = BaseSource(base, tmp_path).read("1.weight")
    assert values.dtype == torch.bfloat16
    assert torch.equal(values, live.model.state_dict()["1.weight"].bfloat16())


@pytest.mark.parametrize(
    ("names", "message"), [({"0.weight"}, "0.weight is trained"), ({"9.weight"}, "9.weight is no parameter")]
)
def test_a_wrong_base_is_not_saved(tmp_path: Path, names: set[str], message: str) -> None:
    live = training()
    base = base_of(live, tmp_path / "base")
    wrong = Base(base.folders, dict.fromkeys(names, base.tensors["1.weight"]))
    with pytest.raises(SaveError, match=message):
        save(tmp_path / "checkpoints", live, wrong)
    assert not (tmp_path / "checkpoints" / "tune-000003").exists()


def change(folder: Path) -> None:
    """One value of a weight; size and time of change stay."""
    file = folder / "model.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_and_touch(folder: Path) -> None:
    change(folder)
    os.utime(folder / "model.safetensors")


def grow(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, r"/base: no such folder"),
    (lambda folder: folder.rename(folder.with_name("moved")), r"/base: no such folder"),
    (lambda folder: (folder / "model.safetensors").unlink(), r"/base/model\.safetensors: missing"),
    (grow, r"/base/model\.safetensors: \d+ bytes, base\.json says \d+"),
    (change_and_touch, r"/base/model\.safetensors: xxh3-128 is \w+, base\.json says \w+"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_base_that_is_not_what_it_was(
    saved: tuple[LiveTraining, Path], damage: Callable[[Path], Any], message: str
) -> None:
    live, path = saved
    damage(path.parents[1] / "base")
    whole = rf"2 weights that it does not hold are in .*/base \(some/model of the recipe; .*{message}.*put back"
    with pytest.raises(CheckpointError, match=whole):
        open_source(path)
    with pytest.raises(CheckpointError, match=whole):
        restore_training_state(live, Checkpoint(path))
    with pytest.raises(CheckpointError, match=whole):
        reshard(path, path.parents[1] / "other", "tune-000003", is_whole=True)
    (problem,) = verify(path)
    assert problem.startswith("base some/model: ")
    # a run must not begin anew because of it
    assert newest_valid(path.parent, print) == path


def test_verify_hashes_the_base(saved: tuple[LiveTraining, Path]) -> None:
    """Which a reader does not as long as size and time are those that were recorded."""
    _, path = saved
    change(path.parents[1] / "base")
    open_source(path)
    assert verify(path, is_hashed=False) == []
    (problem,) = verify(path)
    assert "xxh3-128" in problem


def test_a_base_that_was_copied_back_or_is_linked_to(saved: tuple[LiveTraining, Path]) -> None:
    live, path = saved
    base = path.parents[1] / "base"
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert torch.equal(open_source(path).read("1.weight"), live.model.state_dict()["1.weight"])
    base.rename(base.with_name("moved"))
    base.symlink_to(base.with_name("moved"))
    assert torch.equal(open_source(path).read("1.weight"), live.model.state_dict()["1.weight"])
    assert verify(path) == []


def test_a_checkpoint_as_a_base(saved: tuple[LiveTraining, Path], tmp_path: Path) -> None:
    """What a run holds that began from a run with a base: nothing of either."""
    live, path = saved
    first = live.model.get_parameter("0.weight").detach().clone()
    live.model.requires_grad_(False)
    live.model.get_submodule("2").requires_grad_(True)
    names = {"0.weight", "0.bias", *LEFT_OUT}
    source = open_source(path)
    base = Base(
        (record_folder(path, source_files(path, names), name="a run"),),
        {name: BaseTensor(0, name, torch.float32, source.shape(name)) for name in names},
    )
    second = save(tmp_path / "second", trained_by_adam(live.model), base)
    assert set(base.folders[0].files) == {"index.json", "state.json", "base.json", "rank-00000.safetensors"}
    assert Checkpoint(second).index.tensors.keys() == {"2.weight", "2.bias"}
    assert torch.equal(open_source(second).read("0.weight"), first)
    assert torch.equal(open_source(second).read("1.weight"), live.model.get_parameter("1.weight"))
    assert verify(second) == []
    shutil.rmtree(tmp_path / "base")
    assert verify(second) == [f"base a run: base some/model: {tmp_path / 'base'}: no such folder"]
    with pytest.raises(CheckpointError, match=r"/base: no such folder"):
        open_source(second)


def test_resharding_keeps_the_base_or_takes_it_in(saved: tuple[LiveTraining, Path], tmp_path: Path) -> None:
    live, path = saved
    other = reshard(path, tmp_path / "other", "tune-000003", num_files=2).path
    assert read_base(other) == read_base(path)
    assert Checkpoint(other).index.tensors.keys() == HELD
    half = reshard(path, tmp_path / "half", "tune-000003", dtype=torch.bfloat16, keeps_optimizer=False).path
    assert {open_source(half).dtype(name) for name in live.model.state_dict()} == {torch.bfloat16}
    whole = reshard(path, tmp_path / "whole", "tune-000003", is_whole=True).path
    shutil.rmtree(tmp_path / "base")
    assert read_base(whole) is None and verify(whole) == []
    resumed = training(seed=9, steps=1)
    restore_training_state(resumed, Checkpoint(whole))
    for name, tensor in live.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.update(format_version=1), "format_version is 1, this program reads 2"),
        (lambda data: data.pop("folders"), "no record of a base"),
        (lambda data: data["tensors"].update(x=[0, "a"]), "no record of a base"),
        (lambda data: data["tensors"].update(x=[1, "a", "F32", [1]]), "x is in folder 1, allowed: 0 to 0"),
        (lambda data: data["tensors"].update(x=[0, "a", "F8", [1]]), "no record of a base"),
        (lambda data: data["folders"][0]["files"].update({"../x": [1, "a", 2]}), "names of files in the folder"),
    ],
)
def test_a_record_of_another_form_is_refused(
    saved: tuple[LiveTraining, Path], damage: Callable[[Any], Any], message: str
) -> None:
    _, path = saved
    data = json.loads((path / "base.json").read_text())
    damage(data)
    (path / "base.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"base\.json: .*{message}"):
        Checkpoint(path)


def test_a_record_that_is_lost(saved: tuple[LiveTraining, Path]) -> None:
    _, path = saved
    (path / "base.json").unlink()
    with pytest.raises(CheckpointError, match=r"base\.json: missing, but state\.json has format_version 2"):
        Checkpoint(path)
    assert verify(path) == [f"{path / 'base.json'}: missing"]


def test_a_tensor_in_both(saved: tuple[LiveTraining, Path]) -> None:
    _, path = saved
    base = read_base(path)
    assert base is not None
    twice = Base(base.folders, {**base.tensors, "0.weight": base.tensors["1.weight"]})
    (path / "base.json").write_text(json.dumps(twice.to_json()))
    manifest = json.loads((path / "manifest.json").read_text())
    record = record_folder(path, {"base.json"}, name="x").files["base.json"]
    manifest["files"]["base.json"] = {"size": record.size, "xxh3_128": record.xxh3_128}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert verify(path) == [f"{path / 'index.json'}: names 0.weight, base.json does too"]


def test_a_part_of_a_base(tmp_path: Path) -> None:
    base = base_of(training(), tmp_path / "base")
    two = Base((*base.folders, *base.folders), {**base.tensors, "x": BaseTensor(1, "other", torch.float32, (3,))})
    part = two.only({"x", "y"})
    assert part is not None and part.tensors == {"x": BaseTensor(0, "other", torch.float32, (3,))}
    assert len(part.folders) == 1 and part.num_bytes == 12
    assert two.only({"y"}) is None


def test_a_package_stays_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which lies elsewhere on another machine."""
    from moe_lvlm.data.packs import resolve

    monkeypatch.setenv("MOE_LVLM_CACHE", str(tmp_path / "one"))
    folder = Path(resolve("package:scenes/tower"))
    record = record_folder(folder, {"model.safetensors"}, name="package:scenes/tower")
    assert record.folder == "package:scenes/tower"
    monkeypatch.setenv("MOE_LVLM_CACHE", str(tmp_path / "two"))
    assert record.path() != folder
    assert record.problems(is_hashed=False) == []
