"""Checkpoints of real DeepSpeed engines: what is read out of them is what our own save of the same moment holds."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lvlm.checkpoint.deepspeed_import import DeepSpeedCheckpoint, is_deepspeed_checkpoint, open_deepspeed
from moe_lvlm.checkpoint.layout import CheckpointError
from moe_lvlm.checkpoint.verify import verify
from tests.checkpoint.deepspeed_saves import (
    CONTINUED,
    FOUR,
    PAIR,
    STEPS,
    STOCK_FOUR,
    STOCK_PAIR,
    TAG,
    Case,
    StockCase,
    save_four,
    save_pair,
)
from tests.checkpoint.engines import EXPERTS, assemble, assert_equal, spawn

pytestmark = pytest.mark.distributed

NAMES = [*(f"world2-{case.name}" for case in PAIR), *(f"world4-{case.name}" for case in FOUR)]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saves") / "runs"
    spawn(4, save_four, folder)
    spawn(2, save_pair, folder)
    return folder


def whole(checkpoint: DeepSpeedCheckpoint) -> dict[tuple[str, str], Tensor]:
    """Every tensor, read in two uneven pieces."""
    tensors = {}
    for name, kinds in checkpoint.tensors.items():
        for kind, tensor in kinds.items():
            cut = tensor.numel // 3
            values = torch.cat([tensor.read(0, cut), tensor.read(cut, tensor.numel)])
            tensors[name, kind] = values.view(tensor.shape)
    return tensors


def steps(checkpoint: DeepSpeedCheckpoint) -> dict[tuple[str, str], float | None]:
    return {(name, kind): one.step for name, kinds in checkpoint.tensors.items() for kind, one in kinds.items()}


@pytest.mark.parametrize("name", NAMES)
def test_everything_equals_our_own_save_of_the_same_moment(saves: Path, name: str) -> None:
    checkpoint = open_deepspeed(saves / "deepspeed" / name)
    assert_equal(assemble(saves / "ours" / name), whole(checkpoint))
    state = json.loads((saves / "ours" / name / "state.json").read_text())
    index = json.loads((saves / "ours" / name / "index.json").read_text())["tensors"]
    assert steps(checkpoint) == {
        (tensor, kind): entry.get("step") for tensor, kinds in index.items() for kind, entry in kinds.items()
    }
    assert checkpoint.engine == state["engine"]
    assert checkpoint.engine["lr_scheduler"] == {"last_batch_iteration": STEPS - 1}
    assert checkpoint.learning_rates == state["learning_rates"]
    assert len(set(checkpoint.learning_rates.values())) == 2
    assert checkpoint.global_steps == STEPS
    assert checkpoint.world_size == state["saved_world_size"]
    assert checkpoint.client_state == {"cursor": [3, 4], "note": "half way"}
    assert any("'odd' was left out: a Tensor" in note for note in checkpoint.notes)
    assert (checkpoint.path, checkpoint.kind) == (saves / "deepspeed" / name / TAG, "plain")
    assert checkpoint.has_moe == (None if "-ep1" in name else "autoep")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_a_sound_checkpoint_of_ours(saves: Path, name: str) -> None:
    assert verify(saves / "imported" / name, is_finite_checked=True) == []
    assert_equal(assemble(saves / "ours" / name), assemble(saves / "imported" / name))


@pytest.mark.parametrize(("source", "saved_by", "case"), CONTINUED, ids=lambda value: getattr(value, "name", value))
def test_training_goes_on_as_if_unbroken(saves: Path, source: str, saved_by: Case, case: Case) -> None:
    for rank in range(2):
        unbroken = json.loads((saves / f"{source}-rank{rank}.json").read_text())
        continued = json.loads((saves / f"{source}-to-{case.name}-rank{rank}.json").read_text())
        if saved_by == case:
            assert continued == unbroken
        else:
            # one accumulation, so the same even where other ranks saw other data before
            torch.testing.assert_close(torch.tensor(continued), torch.tensor(unbroken), rtol=2e-6, atol=2e-6)


# ---- deepspeed.moe.layer.MoE

STOCK_RUNS = [*((2, case) for case in STOCK_PAIR), *((4, case) for case in STOCK_FOUR)]
STACK_OF = {
    "gated": {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"},
    "two_layer": {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"},
}


def live_tensors(saves: Path, world: int, case: StockCase) -> dict[tuple[str, str], Tensor]:
    """What the ranks' models held, experts counted over all ranks."""
    found: dict[tuple[str, str], Tensor] = {}
    for rank in range(world):
        live = torch.load(saves / f"world{world}-{case.name}-live{rank}.pt", weights_only=True)
        for (name, kind), tensor in live.items():
            before, marker, rest = name.partition(".deepspeed_experts.")
            if marker:
                local, _, parameter = rest.partition(".")
                share = EXPERTS // case.expert_parallel_size
                number = rank % case.expert_parallel_size * share + int(local)
                name = f"{before}{marker}{number}.{parameter}"
            if (name, kind) in found:
                assert torch.equal(found[name, kind], tensor)
            found[name, kind] = tensor
    return found


def under_our_names(live: Mapping[tuple[str, str], Tensor], expert: str) -> dict[tuple[str, str], Tensor]:
    if expert not in STACK_OF:
        return dict(live)
    ours: dict[tuple[str, str], Any] = {}
    for (name, kind), tensor in live.items():
        layer, marker, rest = name.partition(".deepspeed_moe.")
        if not marker:
            ours[name, kind] = tensor
        elif rest == "gate.wg.weight":
            ours[f"{layer}.router.gate.weight", kind] = tensor
        else:
            number, _, parameter = rest.removeprefix("experts.deepspeed_experts.").partition(".")
            stack = ours.setdefault((f"{layer}.experts.{STACK_OF[expert][parameter]}", kind), [None] * EXPERTS)
            stack[int(number)] = tensor
    return {key: torch.stack(value) if isinstance(value, list) else value for key, value in ours.items()}


@pytest.mark.parametrize(("world", "case"), STOCK_RUNS, ids=lambda value: getattr(value, "name", value))
def test_experts_of_deepspeed_moe_layers(saves: Path, world: int, case: StockCase) -> None:
    checkpoint = open_deepspeed(saves / "deepspeed" / f"world{world}-{case.name}")
    assert_equal(under_our_names(live_tensors(saves, world, case), case.expert), whole(checkpoint))
    assert checkpoint.has_moe == "stock"
    assert {step for (_, kind), step in steps(checkpoint).items() if kind.startswith("exp_avg")} == {float(STEPS)}
    assert set(checkpoint.learning_rates.values()) == {2e-3}
    trained = {name for name, kinds in checkpoint.tensors.items() if "master" in kinds}
    assert set(checkpoint.learning_rates) == trained
    assert any("DeepSpeed's names were kept" in note for note in checkpoint.notes) == (case.expert == "other")


def test_bf16_without_zero(saves: Path) -> None:
    checkpoint = open_deepspeed(saves / "deepspeed" / "wrapped")
    live = torch.load(saves / "wrapped-live.pt", weights_only=True)
    tensors = whole(checkpoint)
    assert {key for key in tensors if key[1] != "weight"} == set(live)
    assert_equal(live, {key: tensors[key] for key in live})
    assert [key for key in tensors if key[1] == "weight"] == [("counted", "weight")]


# ---- universal checkpoints


def convert(saves: Path, name: str, folder: Path) -> Path:
    """DeepSpeed's own converter, in this process."""
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = argparse.Namespace(
        input_folder=str(saves / "deepspeed" / name / TAG),
        output_folder=str(folder / name / "universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(arguments)
    return folder / name


@pytest.mark.parametrize(
    "name",
    [
        "world2-zero1-fp32-ep1",
        "world2-zero1-bf16-ep1-wide",
        "world2-zero2-fp32-ep2",
        "world2-zero3-fp32-ep2",
        "world2-zero3-bf16-ep1",
        "world4-zero1-fp32-ep2",
    ],
)
def test_a_universal_checkpoint_equals_the_plain_one(saves: Path, tmp_path: Path, name: str) -> None:
    checkpoint = open_deepspeed(convert(saves, name, tmp_path))
    plain = open_deepspeed(saves / "deepspeed" / name)
    assert checkpoint.kind == "universal"
    assert_equal(whole(plain), whole(checkpoint))
    assert steps(checkpoint) == steps(plain)
    for field in ("engine", "learning_rates", "client_state", "has_moe", "world_size"):
        assert getattr(checkpoint, field) == getattr(plain, field), field


def test_universal_checkpoints_that_lack_something(saves: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="round_robin_gradients"):
        open_deepspeed(convert(saves, "world2-zero2-bf16-ep1-rr", tmp_path))
    with pytest.raises(CheckpointError, match=r"experts\.b1.*do not put expert parameters other than w1, w2, w3"):
        open_deepspeed(convert(saves, "world4-zero3-bf16-ep2", tmp_path))
    with pytest.raises(CheckpointError, match=r"layers\.1 has experts \[\], but its gate"):
        open_deepspeed(convert(saves, "world2-stock-zero1-fp32-ep1-gated", tmp_path))


def test_our_own_checkpoints_are_not_deepspeeds(saves: Path) -> None:
    for folder in (saves / "ours", saves / "ours" / NAMES[0]):
        assert not is_deepspeed_checkpoint(folder)
        with pytest.raises(CheckpointError, match=r"no checkpoint of DeepSpeed|that is no folder with"):
            open_deepspeed(folder)
