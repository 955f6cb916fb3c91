"""Resharding: the same bits in other files, a run that goes on, and what is left out or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lvlm.checkpoint.files import hash_file
from moe_lvlm.checkpoint.layout import CheckpointError, read_json
from moe_lvlm.checkpoint.original import open_original, read_config, stage_state
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.reshard import name_problem, plan_reshard, reshard
from moe_lvlm.checkpoint.restore import restore_training_state
from moe_lvlm.checkpoint.rng import restore_rng
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.checkpoint.verify import verify
from moe_lvlm.config.load import load_recipe
from tests.checkpoint.engines import Case, assemble, assert_equal, make_engine, spawn, train
from tests.checkpoint.trainings import TRAIN_STATE, save_one, step, stepped
from tests.tiny_run import write_run_inputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one checkpoint that three steps of training made."""
    run = tmp_path_factory.mktemp("run")
    save_one(run / "checkpoints", "sparse-000003", stepped(), state=TRAIN_STATE)
    return run


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, num_files: int) -> None:
    unbroken = stepped(width=700)  # a tensor above 1 MiB, which is divided
    source = save_one(tmp_path / "a", "sparse-000003", unbroken, state=TRAIN_STATE)
    losses = step(unbroken, 2)

    report = reshard(source, tmp_path / "b", "sparse-000003", num_files=num_files)
    assert verify(report.path, is_finite_checked=True) == []
    assert len(list(report.path.glob("rank-*"))) == num_files
    checkpoint = Checkpoint(report.path)
    resumed = stepped(seed=9, steps=1, width=700)
    restore_training_state(resumed, checkpoint)
    generators = checkpoint.rng(0)
    assert generators is not None
    restore_rng(generators)
    assert step(resumed, 2) == losses
    assert checkpoint.state == Checkpoint(source).state
    assert checkpoint.config == Checkpoint(source).config
    assert read_json(report.path / "index.json")["tensors"].keys() == read_json(source / "index.json")["tensors"].keys()


def test_there_and_back_is_the_same(saved: Path, tmp_path: Path) -> None:
    """Ten files to one: ranges that lay in several files are joined."""
    source = saved / "checkpoints" / "sparse-000003"
    index = read_json(source / "index.json")
    ten = divided(source, tmp_path / "ten", 10)
    assert len(list(ten.glob("rank-*"))) == 10
    one = reshard(ten, tmp_path, "one").path
    assert len(list(one.glob("rank-*"))) == 1
    assert_equal(assemble(source), assemble(one))
    for name, kinds in read_json(one / "index.json")["tensors"].items():
        for kind, entry in kinds.items():
            assert len(entry["ranges"]) == 1
            assert entry.get("step") == index["tensors"][name][kind].get("step")


def divided(source: Path, target: Path, count: int) -> Path:
    """The same checkpoint with every tensor cut into as many ranges as it has elements, at most `count`, by hand."""
    shutil.copytree(source, target)
    stored = load_file(source / "rank-00000.safetensors")
    (target / "rank-00000.safetensors").unlink()
    index, files = read_json(source / "index.json"), {number: {} for number in range(count)}
    for name, kinds in index["tensors"].items():
        for kind, entry in kinds.items():
            values = stored[entry["ranges"][0][3]]
            entry["ranges"], start = [], 0
            for number, part in enumerate(values.tensor_split(min(count, max(values.numel(), 1)))):
                file = f"rank-{(number + len(name)) % count:05d}.safetensors"
                files[(number + len(name)) % count][f"{name}/{kind}/{start}"] = part.contiguous()
                entry["ranges"].append([start, start + part.numel(), file, f"{name}/{kind}/{start}"])
                start += part.numel()
    for number, tensors in files.items():
        save_file(tensors, target / f"rank-{number:05d}.safetensors")
    (target / "index.json").write_text(json.dumps(index))
    records = {file.name: hash_file(file) for file in target.iterdir() if file.name != "manifest.json"}
    manifest = {name: {"size": one.size, "xxh3_128": one.xxh3_128} for name, one in records.items()}
    (target / "manifest.json").write_text(json.dumps({"format_version": 1, "files": manifest}))
    assert verify(target) == []
    return target


def test_in_its_own_place(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path / "c")
    path = tmp_path / "c" / "sparse-000003"
    before = assemble(path)
    with pytest.raises(ValueError, match="exists already"):
        reshard(path, tmp_path / "c", "sparse-000003")
    reshard(path, tmp_path / "c", "sparse-000003", is_overwriting=True)
    assert_equal(before, assemble(path))
    assert sorted(one.name for one in (tmp_path / "c").iterdir()) == ["latest", "sparse-000003"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_without_the_optimizer(saved: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    source = saved / "checkpoints" / "sparse-000003"
    path = reshard(saved, tmp_path, "small", keeps_optimizer=False, dtype=dtype).path
    assert verify(path) == []
    state = read_json(path / "state.json")
    assert state["has_optimizer"] is False
    assert state["learning_rates"] == {}
    assert state["global_step"] == 3
    assert not list(path.glob("rng-*"))
    before, after = assemble(source), assemble(path)
    assert {kind for _, kind in after} == {"weight"}
    weights = {name: tensor for (name, kind), tensor in before.items() if kind in ("master", "weight")}
    assert weights.keys() == {name for name, _ in after}
    for name, tensor in weights.items():
        expected = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        assert torch.equal(after[name, "weight"], expected), name
        assert after[name, "weight"].dtype == expected.dtype
    opened = open_source(path)
    assert torch.equal(opened.read("0.weight"), after["0.weight", "weight"])
    with pytest.raises(CheckpointError, match="training cannot go on"):
        restore_training_state(stepped(), Checkpoint(path))


def test_a_type_alone_changes_what_is_not_trained(saved: Path, tmp_path: Path) -> None:
    source = saved / "checkpoints" / "sparse-000003"
    plan = plan_reshard(open_original(source), dtype=torch.bfloat16)
    assert any("not trained change their type" in note for note in plan.notes)
    path = plan.write(tmp_path, "b").path
    before, after = assemble(source), assemble(path)
    for (name, kind), tensor in before.items():
        is_changed = kind == "weight" and tensor.is_floating_point()
        assert after[name, kind].dtype == (torch.bfloat16 if is_changed else tensor.dtype), name
        assert torch.equal(after[name, kind], tensor.bfloat16() if is_changed else tensor)


def test_the_plan_says_what_is_written(saved: Path, tmp_path: Path) -> None:
    original = open_original(saved)
    plan = plan_reshard(original, keeps_optimizer=False)
    sizes = {key: tensor.nbytes for key, tensor in assemble(original.path).items()}
    moment = sum(size for (_, kind), size in sizes.items() if kind == "exp_avg")
    assert plan.dropped == {"exp_avg": moment, "exp_avg_sq": moment}
    kept = sum(size for (_, kind), size in sizes.items() if kind in ("weight", "master"))
    assert plan.num_bytes == kept == sum(plan.files().values())
    assert plan.kinds() == {"weight": (len(assemble(original.path)) - 2 * len(moments(sizes)), kept)}
    assert len(plan_reshard(original, max_file_bytes=1000).files()) > 1
    with pytest.raises(ValueError, match="file size: 0 bytes"):
        plan_reshard(original, max_file_bytes=0)
    plan = plan_reshard(original)
    assert name_problem(plan, "sparse-000003") is None
    assert "if it is called sparse-000003" in str(name_problem(plan, "merged"))
    assert name_problem(plan_reshard(original, keeps_optimizer=False), "merged") is None


def moments(sizes: dict[tuple[str, str], int]) -> list[str]:
    return [name for name, kind in sizes if kind == "exp_avg"]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rng-00000.safetensors", "index.json", "state.json"])
def test_damage_is_not_copied(saved: Path, tmp_path: Path, file: str) -> None:
    """A flipped bit must not get a new, right checksum."""
    shutil.copytree(saved / "checkpoints" / "sparse-000003", tmp_path / "s")
    data = bytearray((tmp_path / "s" / file).read_bytes())
    data[-1] ^= 4
    (tmp_path / "s" / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file}: xxh3-128 is"):
        reshard(tmp_path / "s", tmp_path / "out", "x", keeps_optimizer=False)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_dropped_values_are_verified_too(saved: Path, tmp_path: Path) -> None:
    """The moments are not copied, but they lie in the same file."""
    path = tmp_path / "s"
    shutil.copytree(saved / "checkpoints" / "sparse-000003", path)
    stored = load_file(path / "rank-00000.safetensors")
    data = (path / "rank-00000.safetensors").read_bytes()
    moment = next(tensor for key, tensor in stored.items() if ":exp_avg:" in key and tensor.count_nonzero())
    place = data.index(moment.numpy().tobytes())
    (path / "rank-00000.safetensors").write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    with pytest.raises(CheckpointError, match="the source is damaged"):
        reshard(path, tmp_path / "out", "x", keeps_optimizer=False)


def test_what_is_no_source(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        open_original(tmp_path / "missing")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="a run without a valid checkpoint"):
        open_original(tmp_path / "run")
    with pytest.raises(ValueError, match="has run; allowed: a checkpoint of ours"):
        open_original(tmp_path)
    with pytest.raises(ValueError, match="config is for DeepSpeed's alone"):
        open_original(saved, config=tmp_path)
    with pytest.raises(ValueError, match="stage: 'tune', but no recipe"):
        open_original(saved, stage="tune")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="allowed: a model's configuration"):
        read_config(tmp_path)


def test_interruption_leaves_nothing_and_ends_at_once(saved: Path, tmp_path: Path) -> None:
    def interrupt(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(saved / "checkpoints" / "sparse-000003", tmp_path / "out", "x", advance=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


# ---- DeepSpeed


def test_steps_get_their_place_in_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write_run_inputs(tmp_path))  # tune: 3 steps, sparse: 5 steps, both of 8 samples
    assert stage_state(recipe, "sparse", global_steps=2, world_size=4) == {
        "stage": 1, "step": 2, "global_step": 5, "samples": 16, "bad": 0, "tokens": 0, "is_stage_done": False,
        "world_size": 4, "expert_parallel_size": 1, "zero_stage": 0,
    }  # fmt: skip
    assert stage_state(recipe, "tune", global_steps=3, world_size=1)["is_stage_done"] is True
    with pytest.raises(ValueError, match=r"several stages.*tune, sparse"):
        stage_state(recipe, None, global_steps=2, world_size=4)
    with pytest.raises(ValueError, match=r"stage: 'spare'; allowed: tune, sparse"):
        stage_state(recipe, "spare", global_steps=2, world_size=4)
    with pytest.raises(ValueError, match="4 steps were done; stage tune of the recipe has 3"):
        stage_state(recipe, "tune", global_steps=4, world_size=4)


def save_with_deepspeed(folder: Path) -> None:
    """One moment of an engine, by DeepSpeed and by us."""
    from moe_lvlm.checkpoint.engine import live_engine

    engine = make_engine(Case(1), seed=1)
    train(engine, 0, 2)
    engine.save_checkpoint(str(folder / "theirs"), tag="t")
    state = {"global_step": 2}
    save_checkpoint(
        folder, "ours", live_engine(engine), config={}, state=state, rng={}, ranks=SingleRank(), log=print
    )  # fmt: skip
    engine.destroy()


@pytest.mark.distributed
def test_a_checkpoint_of_deepspeed_becomes_ours(tmp_path: Path) -> None:
    spawn(1, save_with_deepspeed, tmp_path)
    recipe = load_recipe(write_run_inputs(tmp_path / "inputs"))
    (tmp_path / "config.json").write_text('{"model_type": "tiny"}')
    with pytest.raises(ValueError, match=r"no model configuration.*--config"):
        open_original(tmp_path / "theirs")
    options: dict[str, Any] = {"config": tmp_path / "config.json", "recipe": recipe, "stage": "sparse"}
    path = reshard(tmp_path / "theirs", tmp_path / "new", "sparse-000002", num_files=1, **options).path
    assert verify(path, is_finite_checked=True) == []
    assert_equal(assemble(tmp_path / "ours"), assemble(path))
    ours, state = Checkpoint(tmp_path / "ours").state, Checkpoint(path).state
    assert state["engine"]["global_steps"] == ours["engine"]["global_steps"] == 2
    assert state["learning_rates"] == ours["learning_rates"]
    assert (state["stage"], state["step"], state["global_step"], state["samples"]) == (1, 2, 5, 16)
    assert read_json(path / "config.json") == {"model_type": "tiny"}
    by_tag = open_original(tmp_path / "theirs", tag="t", config=tmp_path)
    assert "stage" not in by_tag.state and by_tag.training_name is None
    assert any("without a recipe" in note for note in by_tag.notes)
    with pytest.raises(ValueError, match="tag 'u'"):
        open_original(tmp_path / "theirs", tag="u", config=tmp_path)
