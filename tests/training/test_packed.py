"""Runs on packed rows: the losses of padded ones, on any number of processes, resumed, and what is refused before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moe_lvlm
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.loader import MicroBatch
from moe_lvlm.training.plan import plan_stages
from moe_lvlm.training.step import count_step, to_device
from tests.models.packed_batches import samples
from tests.tiny_models import IMAGE_ID, PAD_ID
from tests.tiny_run import qmoe_recipe, tiny_recipe, write_qmoe_inputs
from tests.training.launching import Server, events, kill_after

PACKED = "data.batching=packed"


def losses(server: Server, recipe: Path, folder: Path, *overrides: str, world: int = 2) -> list[float]:
    server.run(["train", str(recipe), *overrides, f"output_dir={folder}"], world=world)
    return events(folder).losses()


@pytest.mark.distributed
def test_a_run_learns_the_same(server: Server, recipe: Path, tmp_path: Path) -> None:
    padded = losses(server, recipe, tmp_path / "padded")
    packed = losses(server, recipe, tmp_path / "packed", PACKED, "parallel.expert_parallel_size=2")
    assert len(packed) == 8
    assert packed == pytest.approx(padded, rel=1e-5)
    tokens = [line["tokens"] for line in events(tmp_path / "padded").named("step")]
    assert [line["tokens"] for line in events(tmp_path / "packed").named("step")] == tokens


@pytest.mark.distributed
def test_a_balanced_run_is_the_same_for_any_world_and_resumed(server: Server, recipe: Path, tmp_path: Path) -> None:
    settings = (PACKED, "data.balance=true")
    alone = losses(server, recipe, tmp_path / "alone", *settings, world=1)
    assert losses(server, recipe, tmp_path / "two", *settings, "data.num_workers=1") == pytest.approx(alone, rel=1e-5)
    cut = tmp_path / "cut"
    command = ["train", str(recipe), *settings, "train.checkpoint.every=1", f"output_dir={cut}"]
    kill_after(server, command, cut, "sparse", 2)
    server.run(command)
    assert events(cut).losses() == pytest.approx(alone, rel=1e-5)


def plan(recipe: dict[str, Any], folder: Path) -> None:
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(recipe))
    plan_stages(moe_lvlm.load_recipe(path), world_size=1)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    write_qmoe_inputs(tmp_path, "t5")
    recipe = qmoe_recipe(tmp_path, "t5")
    plan(recipe, tmp_path)
    recipe["data"]["batching"] = "packed"
    with pytest.raises(ValueError, match=r"data.batching: packed, but the language model \(t5\) is an encoder-decoder"):
        plan(recipe, tmp_path)


def test_a_language_model_that_is_not_known_is_refused(recipe: Path, tmp_path: Path) -> None:
    changed = tiny_recipe(recipe.parent)
    changed["stages"] = changed["stages"][:1]
    changed["data"]["batching"] = "packed"
    plan(changed, tmp_path)
    changed["model"]["language_model"]["from_config"] |= {"model_type": "gemma", "head_dim": 8}
    with pytest.raises(
        ValueError, match=r"data.batching: packed, but the language model is 'gemma'; allowed with it: llama"
    ):
        plan(changed, tmp_path)


@pytest.mark.parametrize(("is_packed", "positions"), [(False, 5 * 16), (True, 50)])
def test_positions_and_tokens_are_counted(is_packed: bool, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Collator(pad_token_id=PAD_ID, image_token_id=IMAGE_ID, is_packed=is_packed)(samples())
    lengths = [len(sample.input_ids) for sample in samples()]
    assert (sum(lengths), max(lengths)) == (50, 16)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    counts = count_step([MicroBatch(batch, (), 5)] * 2, is_stopping=False, device=torch.device("cpu"))
    assert (counts.tokens, counts.positions) == (2 * 50, 2 * positions)
    assert counts.supervised == 2 * (2 + 3 + 2 + 3 + 2)


def test_a_packed_batch_moves() -> None:
    batch = Collator(pad_token_id=PAD_ID, image_token_id=IMAGE_ID, is_packed=True)(samples())
    moved = to_device(batch, torch.device("meta"), torch.bfloat16)
    assert moved.keys() == batch.keys()
    assert moved["sample_lengths"] == batch["sample_lengths"]
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["routing"].modality_BS.device.type == moved["position_ids"].device.type == "meta"
