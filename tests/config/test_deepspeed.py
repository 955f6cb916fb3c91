"""The dict that DeepSpeed gets: mechanics from a file, the rest from the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.config.deepspeed import deepspeed_folder, resolve_deepspeed
from moe_lvlm.config.load import RecipeError, load_recipe
from moe_lvlm.config.recipe import Recipe

NAMES = ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
STAGES = {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}


def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", overrides)


def resolve(world_size: int, *overrides: str) -> dict[str, Any]:
    resolved = recipe(*overrides)
    return resolve_deepspeed(resolved, resolved.stages[0], world_size)


def resolve_file(folder: Path, text: str | dict[str, Any], world_size: int = 2, *overrides: str) -> dict[str, Any]:
    path = folder / "mine.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return resolve(world_size, f"parallel.deepspeed={path}", *overrides)


def test_these_files_are_shipped() -> None:
    assert sorted(path.stem for path in deepspeed_folder().glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_reads_every_shipped_file(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(
        resolve(1, f"parallel.deepspeed={name}", "parallel.expert_parallel_size=1", "train.precision=bf16")
    )
    assert config.zero_optimization_stage == STAGES[name]
    assert config.zero_config.contiguous_gradients
    assert (config.zero_config.offload_optimizer is not None) == name.endswith("offload")
    assert (config.zero_config.offload_param is not None) == (name == "zero3_offload")
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (32, 2)
    assert config.train_batch_size == 64
    assert config.gradient_clipping == 1.0
    assert config.bfloat16_config.enabled
    assert config.optimizer_name is None
    # Client torch.optim.AdamW together with offload.
    assert config.zero_allow_untested_optimizer
    assert not config.zero_force_ds_cpu_optimizer


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_file_says_when_to_take_it(name: str) -> None:
    """In the file and in the README's table; and DeepSpeed, which knows no such key, does not get it."""
    folder = deepspeed_folder()
    comment = json.loads((folder / f"{name}.json").read_text())["_comment"]
    assert any("ake it " in line for line in comment)
    assert f"| `{name}` |" in (folder / "README.md").read_text()
    resolved = resolve(1, f"parallel.deepspeed={name}", "parallel.expert_parallel_size=1")
    assert "_comment" not in resolved and "_comment" not in resolved["zero_optimization"]


@pytest.mark.parametrize("comment", ["", "one line", [], ["two", "lines"]])
def test_a_comment_is_for_readers(tmp_path: Path, comment: str | list[str]) -> None:
    plain = {"zero_optimization": {"stage": 2}}
    assert resolve_file(tmp_path, {"_comment": comment, **plain}) == resolve_file(tmp_path, plain)


def test_values_of_the_recipe() -> None:
    resolved = resolve(4, "stages.0.micro_batch=4", "train.gradient_clipping=0", "parallel.deepspeed=zero1")
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 4  # 64 / (4 x 4)
    assert resolved["gradient_clipping"] == 0  # written: DeepSpeed's own default is 1
    assert resolved["bf16"] == {"enabled": False}
    assert resolved["zero_optimization"]["stage"] == 1
    assert "optimizer" not in resolved


def test_auto_means_absent(tmp_path: Path) -> None:
    text = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": "auto",
        "zero_optimization": {"stage": 2},
        "wall_clock_breakdown": True,
    }
    plain = {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}
    assert resolve_file(tmp_path, text) == resolve_file(tmp_path, plain)
    assert resolve_file(tmp_path, text)["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("key", "value", "place", "owner"),
    [
        ("train_batch_size", 64, "train_batch_size", "stages.N.global_batch"),
        ("train_micro_batch_size_per_gpu", 8, "train_micro_batch_size_per_gpu", "stages.N.micro_batch"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps", "follows from"),
        ("gradient_clipping", 0.5, "gradient_clipping", "train.gradient_clipping"),
        ("bf16", {"enabled": True}, "bf16.enabled", "train.precision"),
        ("fp16", {"enabled": "auto", "loss_scale": 0}, "fp16.loss_scale", "train.precision"),
        ("optimizer", {"type": "AdamW", "params": {"lr": "auto"}}, "optimizer.type", "train.optimizer"),
        ("scheduler", {"type": "WarmupLR"}, "scheduler.type", "train.schedule"),
        ("expert_parallel", {"enabled": True}, "expert_parallel.enabled", "parallel.expert_parallel_size"),
    ],
)
def test_a_value_that_the_recipe_owns_is_refused(
    tmp_path: Path, key: str, value: object, place: str, owner: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_file(tmp_path, {"zero_optimization": {"stage": 2}, key: value})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'mine.json'}: {place}: ")
    assert owner in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 4}}, "allowed: 0, 1, 2, 3"),
        ({"zero_optimization": 2}, "an object with a stage"),
        ({"zero_optimization": {"stage": 0}}, "clips by a wrong gradient norm"),
        ({}, "clips by a wrong gradient norm"),
        ({"zero_optimization": {"stage": 1, "contiguous_gradients": False}}, "mixes the gradients"),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "mixes the gradients"),
        ({"_comment": 7}, "_comment: 7; allowed: a string or a list of strings"),
        ({"_comment": ["fine", {"stage": 2}]}, "allowed: a string or a list of strings"),
        ({"_coment": "x"}, "did you mean '_comment'?"),
        ("[]", "JSON object"),
        ("{", "not a JSON file"),
        ('{"aio": {}, "aio": {}}', "'aio' stands twice"),
    ],
)
def test_a_file_that_cannot_be_right(tmp_path: Path, text: str | dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=r"mine\.json") as caught:
        resolve_file(tmp_path, text)
    assert expected in str(caught.value)


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 1, "contiguous_gradients": False}])
def test_without_expert_parallelism_these_are_sound(tmp_path: Path, zero: dict[str, Any]) -> None:
    resolved = resolve_file(tmp_path, {"zero_optimization": zero}, 2, "parallel.expert_parallel_size=1")
    assert resolved["zero_optimization"] == zero


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (1, [], ["parallel.expert_parallel_size: 2", "processes (1)"]),
        (2, ["parallel.expert_parallel_size=4"], ["parallel.expert_parallel_size: 4", "processes (2)"]),
        (4, [], ["stage align", "64", "32 x 4 = 128"]),
        (2, ["parallel.deepspeed=zero4"], ["parallel.deepspeed", "'zero4'", "did you mean 'zero3'?"]),
        (2, ["parallel.deepspeed=nowhere.json"], ["parallel.deepspeed", "nowhere.json", "no such file"]),
    ],
)
def test_what_does_not_fit_is_named(world_size: int, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(world_size, *overrides)
    for piece in expected:
        assert piece in str(caught.value)
