"""Checkpoints of DeepSpeed made by hand: hostile, torn, unusual ones. No process group, no DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lvlm.checkpoint.deepspeed_import import is_deepspeed_checkpoint, open_deepspeed
from moe_lvlm.checkpoint.layout import CheckpointError

MODEL = "mp_rank_00_model_states.pt"


def rank_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def save_model(folder: Path, *, world_size: int, shapes: list[dict[str, tuple[int, ...]]] | None, **more: Any) -> None:
    """A file as `engine.save_checkpoint` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "module": OrderedDict(),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None
        if shapes is None
        else [OrderedDict((n, torch.Size(s)) for n, s in g.items()) for g in shapes],
        "shared_params": {},
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": 7,
        "global_samples": 56,
        "dp_world_size": world_size,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": "0.19.8",
    }
    torch.save({**state, **more}, folder / MODEL)


def save_rank(folder: Path, rank: int, masters: list[Tensor], *, groups: list[dict[str, Any]], **more: Any) -> None:
    """A rank's file at ZeRO 1 or 2: moments are 10 and 100 times the master."""
    optimizer = {
        "state": {
            i: {"step": torch.tensor(7.0), "exp_avg": 10 * master, "exp_avg_sq": 100 * master}
            for i, master in enumerate(masters)
        },
        "param_groups": [{"lr": 0.5, "params": [i], **group} for i, group in enumerate(groups)],
    }
    state = {
        "base_optimizer_state": optimizer,
        "single_partition_of_fp32_groups": masters,
        "zero_stage": 2,
        "group_paddings": [0] * len(masters),
        "partition_count": [2] * len(masters),
        "ds_version": "0.19.8",
    }
    torch.save({"optimizer_state_dict": {**state, **more}, "ds_config": {}}, folder / rank_file(rank))


@pytest.fixture
def two_ranks(tmp_path: Path) -> Path:
    """Parameters w [2, 2] and b [3], 7 elements, in two partitions of 4."""
    folder = tmp_path / "run" / "global_step7"
    save_model(folder, world_size=2, shapes=[{"w": (2, 2), "b": (3,)}])
    save_rank(folder, 0, [torch.tensor([0.0, 1.0, 2.0, 3.0])], groups=[{}])
    save_rank(folder, 1, [torch.tensor([4.0, 5.0, 6.0])], groups=[{}], group_paddings=[1])
    (folder.parent / "latest").write_text("global_step7")
    return folder


def values(path: Path, name: str, kind: str = "master") -> list[Any]:
    tensor = open_deepspeed(path).tensors[name][kind]  # type: ignore[index]
    return tensor.read(0, tensor.numel).view(tensor.shape).tolist()


# ---- layout


def test_partitions_and_padding(two_ranks: Path) -> None:
    checkpoint = open_deepspeed(two_ranks)
    assert values(two_ranks, "w") == [[0, 1], [2, 3]]
    assert values(two_ranks, "b", "exp_avg_sq") == [400, 500, 600]
    assert checkpoint.learning_rates == {"w": 0.5, "b": 0.5}
    assert checkpoint.tensors["b"]["exp_avg"].step == 7.0
    assert checkpoint.tensors["b"]["master"].step is None
    assert checkpoint.tensors["w"]["exp_avg"].read(1, 3).tolist() == [10, 20]
    assert checkpoint.engine == {"global_steps": 7, "global_samples": 56, "skipped_steps": 0, "lr_scheduler": None}


def test_a_parameter_over_both_partitions_and_padding_between(tmp_path: Path) -> None:
    # a: 3 elements, 1 of padding, b: 5 elements; partitions of 5
    save_model(tmp_path, world_size=2, shapes=[{"a": (3,), "b": (5,)}])
    paddings = {"param_alignment_paddings": [[1, 0]]}
    save_rank(tmp_path, 0, [torch.tensor([1.0, 2.0, 3.0, -1.0, 4.0])], groups=[{}], **paddings)
    save_rank(tmp_path, 1, [torch.tensor([5.0, 6.0, 7.0, 8.0])], groups=[{}], group_paddings=[1], **paddings)
    assert values(tmp_path, "a") == [1, 2, 3]
    assert values(tmp_path, "b") == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(("is_data_first", "expected"), [(False, [0, 2, 1, 3]), (True, [0, 1, 2, 3])])
def test_experts_over_four_ranks(tmp_path: Path, is_data_first: bool, expected: list[float]) -> None:
    """Two experts, a half on each rank. Ranks 0 and 2 hold the first one, or 0 and 1 if data parallelism comes first."""
    prefix = "moe.deepspeed_moe"
    expert = f"{prefix}.experts.deepspeed_experts.0.only.weight"
    gate = {f"{prefix}.gate.wg.weight": (2, 2)}
    config = {"use_data_before_expert_parallelism": is_data_first}
    save_model(tmp_path, world_size=4, shapes=[gate, {expert: (2, 1)}], ds_config=config, num_experts=[2])
    for rank in range(4):
        groups = [{}, {"moe": True, "name": "ep_size_2"}]
        save_rank(tmp_path, rank, [torch.tensor([float(rank)])] * 2, groups=groups, partition_count=[4, 2])
    found = [values(tmp_path, f"{prefix}.experts.deepspeed_experts.{e}.only.weight") for e in range(2)]
    assert [row[0] for rows in found for row in rows] == expected
    assert values(tmp_path, f"{prefix}.gate.wg.weight") == [[0, 1], [2, 3]]


def test_an_optimizer_that_is_not_adam(two_ranks: Path) -> None:
    for rank, master in enumerate([torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])]):
        base = {"state": {0: {"momentum_buffer": master}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
        save_rank(two_ranks, rank, [master], groups=[{}], base_optimizer_state=base, group_paddings=[rank])
    checkpoint = open_deepspeed(two_ranks)
    assert {kind for kinds in checkpoint.tensors.values() for kind in kinds} == {"master"}
    assert any("momentum_buffer" in note for note in checkpoint.notes)


def test_values_stay_on_disk_until_they_are_read(tmp_path: Path) -> None:
    numel = 2**22
    save_model(tmp_path, world_size=1, shapes=[{"w": (numel,)}])
    save_rank(tmp_path, 0, [torch.arange(numel) - float(numel)], groups=[{}], partition_count=[1])
    before = resident_bytes()
    checkpoint = open_deepspeed(tmp_path)
    assert checkpoint.tensors["w"]["exp_avg"].read(numel - 2, numel).tolist() == [-20.0, -10.0]
    assert resident_bytes() - before < 3 * 4 * numel / 4


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- without ZeRO


def save_numbered(folder: Path, weights: dict[str, Tensor], order: list[list[str]], **more: Any) -> None:
    """The optimizer's tensors by number, in groups of these parameters; the moment is twice the weight."""
    numbers = iter(range(100))
    state, groups = {}, []
    for names in order:
        group = []
        for name in names:
            number = next(numbers)
            state[number] = {"step": torch.tensor(3.0), "exp_avg": 2 * weights[name], "exp_avg_sq": weights[name]}
            group.append(number)
        groups.append({"lr": 0.1 * len(names), "params": group, **more})
    optimizer = {"state": state, "param_groups": groups}
    save_model(folder, world_size=1, shapes=None, module=OrderedDict(weights), optimizer=optimizer, shared_params=None)


def test_names_of_numbered_states(tmp_path: Path) -> None:
    weights = {
        "a.weight": torch.rand(2, 3),
        "a.bias": torch.rand(2),
        "b.weight": torch.rand(2, 3),
        "b.bias": torch.rand(2),
    }
    weights["frozen"] = torch.rand(7)
    save_numbered(tmp_path, weights, [["a.weight", "b.weight"], ["a.bias", "b.bias"]])
    checkpoint = open_deepspeed(tmp_path)
    for name in ("a.weight", "a.bias", "b.weight", "b.bias"):
        assert values(tmp_path, name) == weights[name].tolist()
        assert values(tmp_path, name, "exp_avg") == (2 * weights[name]).tolist()
        assert checkpoint.tensors[name]["exp_avg"].step == 3.0
    assert list(checkpoint.tensors["frozen"]) == ["weight"]
    assert set(checkpoint.learning_rates) == weights.keys() - {"frozen"}


def test_numbered_states_that_fit_in_two_ways(tmp_path: Path) -> None:
    weights = {"frozen": torch.rand(3), "trained": torch.rand(3)}
    save_numbered(tmp_path, weights, [["trained"]])
    with pytest.raises(CheckpointError, match=r"unclear which optimizer state .* more than one order is possible"):
        open_deepspeed(tmp_path)
    save_numbered(tmp_path, weights, [["trained"]], param_names=["trained"])
    assert values(tmp_path, "trained", "exp_avg") == (2 * weights["trained"]).tolist()
    save_numbered(tmp_path, {"a": torch.rand(3)}, [["a"]], param_names=["b"])
    with pytest.raises(CheckpointError, match="'b' is no parameter of the model"):
        open_deepspeed(tmp_path)


def test_tied_parameters_without_zero(tmp_path: Path) -> None:
    weight = torch.rand(2, 3)
    save_numbered(tmp_path, {"embedding": weight, "head": weight}, [["embedding"]])
    assert list(open_deepspeed(tmp_path).tensors) == ["embedding"]


# ---- hostile files


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("file", [MODEL, rank_file(1)])
def test_a_pickle_that_runs_a_command_is_refused(two_ranks: Path, tmp_path: Path, file: str, legacy: bool) -> None:
    marker = tmp_path / "it-ran"
    torch.save({"optimizer_state_dict": Evil(marker)}, two_ranks / file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=rf"{file}: refused, its pickle names (posix|nt)\.system"):
        open_deepspeed(two_ranks)
    assert not marker.exists()
    # the file would have done it
    torch.load(two_ranks / file, weights_only=False)
    assert marker.exists()


def test_classes_other_than_deepspeeds_data_are_refused(two_ranks: Path) -> None:
    state = torch.load(two_ranks / MODEL, weights_only=True)
    torch.save({**state, "args": Path("x")}, two_ranks / MODEL)
    with pytest.raises(CheckpointError, match=rf"{MODEL}: refused, its pickle names pathlib"):
        open_deepspeed(two_ranks)


class ByName:
    """Pickled as Python 3.11.2 pickles a member of an enum: by getattr."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


@pytest.fixture(scope="module")
def stages() -> type:
    """DeepSpeed's enum of ZeRO stages, the class alone."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return ZeroStageEnum


def test_a_zero_stage_that_was_pickled_by_name(two_ranks: Path, stages: type) -> None:
    for rank in (0, 1):
        saved = torch.load(two_ranks / rank_file(rank), weights_only=False)
        saved["optimizer_state_dict"]["zero_stage"] = ByName(stages, "gradients")
        torch.save(saved, two_ranks / rank_file(rank))
    assert values(two_ranks, "w") == [[0, 1], [2, 3]]


@pytest.mark.parametrize("name", ["__class__", "mro", "from_bytes", "max_stage"])
def test_no_other_attribute_is_taken(two_ranks: Path, stages: type, name: str) -> None:
    saved = torch.load(two_ranks / rank_file(0), weights_only=False)
    torch.save({**saved, "more": ByName(stages, name)}, two_ranks / rank_file(0))
    with pytest.raises(CheckpointError, match=f"its pickle takes the attribute '{name}'"):
        open_deepspeed(two_ranks)


def test_attributes_of_other_classes_are_refused(two_ranks: Path) -> None:
    saved = torch.load(two_ranks / rank_file(0), weights_only=False)
    torch.save({**saved, "more": ByName(Path, "unlink")}, two_ranks / rank_file(0))
    with pytest.raises(CheckpointError, match="refused"):
        open_deepspeed(two_ranks)


def test_no_file_outside_of_the_folder_is_opened(two_ranks: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.pt"
    shutil.move(two_ranks / rank_file(1), outside)
    (two_ranks / rank_file(1)).symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside of"):
        open_deepspeed(two_ranks)


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", ".", "", "a/b"])
def test_latest_may_name_a_folder_inside_only(two_ranks: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(two_ranks, tmp_path / "outside")
    (two_ranks.parent / "latest").write_text(name)
    assert not is_deepspeed_checkpoint(two_ranks.parent)
    with pytest.raises(CheckpointError, match="allowed is the name of a folder in it"):
        open_deepspeed(two_ranks.parent)


def test_parameter_names_do_not_lead_out_of_a_universal_checkpoint(two_ranks: Path, tmp_path: Path) -> None:
    save_model(two_ranks, world_size=2, shapes=[{"../../../secret": (1,)}])
    (two_ranks / "zero").mkdir()
    torch.save({"param_groups": [{"lr": 1.0}]}, two_ranks / "zero" / "optimizer_state.pt")
    (tmp_path / "secret").mkdir()
    torch.save({"param": torch.ones(1)}, tmp_path / "secret" / "fp32.pt")
    with pytest.raises(CheckpointError, match="outside of"):
        open_deepspeed(two_ranks)


# ---- which checkpoint


def test_latest_and_tags(two_ranks: Path) -> None:
    run = two_ranks.parent
    assert is_deepspeed_checkpoint(run)
    assert is_deepspeed_checkpoint(two_ranks)
    assert open_deepspeed(run).path == two_ranks
    shutil.copytree(two_ranks, run / "other")
    assert open_deepspeed(run).path == two_ranks
    assert open_deepspeed(run, tag="other").path == run / "other"
    with pytest.raises(CheckpointError, match="tag 'none', but that is no folder"):
        open_deepspeed(run, tag="none")
    (run / "latest").unlink()
    assert not is_deepspeed_checkpoint(run)
    with pytest.raises(CheckpointError, match=r"neither .* nor a file named latest"):
        open_deepspeed(run)


# ---- torn and unknown


def test_a_missing_rank(two_ranks: Path) -> None:
    (two_ranks / rank_file(1)).unlink()
    with pytest.raises(CheckpointError, match=r"optimizer states of ranks \[1\] are missing, 2 ranks saved"):
        open_deepspeed(two_ranks)


def test_a_rank_too_many(two_ranks: Path) -> None:
    shutil.copy(two_ranks / rank_file(1), two_ranks / rank_file(2))
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_2.*of another save"):
        open_deepspeed(two_ranks)


@pytest.mark.parametrize("part", [0.0, 0.4, 0.97])
def test_a_truncated_file(two_ranks: Path, part: float) -> None:
    path = two_ranks / rank_file(1)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=rf"{path.name}: not a readable torch file"):
        open_deepspeed(two_ranks)


def test_a_rank_of_another_size(two_ranks: Path) -> None:
    save_rank(two_ranks, 1, [torch.tensor([4.0, 5.0])], groups=[{}], group_paddings=[1])
    with pytest.raises(CheckpointError, match="torn"):
        open_deepspeed(two_ranks)


@pytest.mark.parametrize("key", ["dp_world_size", "module", "global_steps", "buffer_names"])
def test_a_layout_field_that_is_missing(two_ranks: Path, key: str) -> None:
    state = torch.load(two_ranks / MODEL, weights_only=True)
    del state[key]
    torch.save(state, two_ranks / MODEL)
    with pytest.raises(CheckpointError, match=rf"{MODEL}: has no '{key}'"):
        open_deepspeed(two_ranks)


def test_a_field_of_another_form(two_ranks: Path) -> None:
    save_rank(two_ranks, 1, [torch.tensor([4.0, 5.0, 6.0])], groups=[{}], group_paddings=[])
    with pytest.raises(CheckpointError, match=r"not the layout of DeepSpeed 0\.19\.8: IndexError"):
        open_deepspeed(two_ranks)


def test_frozen_weights_that_were_not_saved_are_noted(two_ranks: Path) -> None:
    shapes: list[dict[str, tuple[int, ...]]] = [{"w": (2, 2), "b": (3,)}]
    zero = {"zero_optimization": {"stage": 2}}
    save_model(two_ranks, world_size=2, shapes=shapes, ds_config=zero, frozen_param_shapes=OrderedDict())
    assert not any("exclude_frozen_parameters" in note for note in open_deepspeed(two_ranks).notes)
    save_model(two_ranks, world_size=2, shapes=shapes, ds_config=zero, frozen_param_shapes=None)
    assert any("exclude_frozen_parameters" in note for note in open_deepspeed(two_ranks).notes)


def test_another_version_is_noted(two_ranks: Path) -> None:
    save_model(two_ranks, world_size=2, shapes=[{"w": (2, 2), "b": (3,)}], ds_version="0.16.1")
    assert any("DeepSpeed 0.16.1" in note for note in open_deepspeed(two_ranks).notes)


def test_other_parallelism_is_refused(two_ranks: Path) -> None:
    shutil.copy(two_ranks / MODEL, two_ranks / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match="tensor parallelism"):
        open_deepspeed(two_ranks)
    (two_ranks / "mp_rank_01_model_states.pt").rename(two_ranks / "layer_00-model_00-model_states.pt")
    with pytest.raises(CheckpointError, match="pipeline parallelism"):
        open_deepspeed(two_ranks)


def test_frozen_experts_of_which_only_a_part_was_saved(tmp_path: Path) -> None:
    """Where all experts are frozen DeepSpeed does not know of expert parallelism, and saves rank 0's share."""
    module = OrderedDict({"mlp.experts.w1": torch.rand(2, 3, 3)})
    save_model(tmp_path, world_size=1, shapes=[{"mlp.router.gate.weight": (4, 3)}], module=module)
    save_rank(tmp_path, 0, [torch.rand(12)], groups=[{}], partition_count=[1])
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.w1 has 2 experts, but the layer's router has 4"):
        open_deepspeed(tmp_path)


def test_what_the_user_stored(two_ranks: Path) -> None:
    stored = {"epoch": 3, "seen": (1, 2), "by_number": {1: 2}, "best": {"loss": 0.5, "at": None}, "t": torch.ones(1)}
    save_model(
        two_ranks, world_size=2, shapes=[{"w": (2, 2), "b": (3,)}], lr_scheduler={"milestones": {30: 1}}, **stored
    )
    checkpoint = open_deepspeed(two_ranks)
    assert checkpoint.client_state == {"epoch": 3, "seen": [1, 2], "best": {"loss": 0.5, "at": None}}
    assert json.loads(json.dumps(checkpoint.client_state)) == checkpoint.client_state
    assert checkpoint.engine["lr_scheduler"] is None
    told = " ".join(checkpoint.notes)
    assert "'by_number' was left out" in told
    assert "'t' was left out" in told
    assert "lr_scheduler: its state was left out: key 30 is not a string" in told
