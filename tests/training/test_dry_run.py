"""--dry-run says what a run would do, and what it says is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from moe_lvlm.config.load import dump_recipe, load_recipe
from moe_lvlm.models.build import build_dense
from moe_lvlm.models.upcycle import upcycle
from moe_lvlm.training.dry_run import describe
from moe_lvlm.training.trainable import select_trainable
from tests.tiny_run import write_run_inputs


def section(text: str, title: str) -> str:
    """What stands below a title, up to the next."""
    start = text.index(title) + len(title)
    return re.split(r"\n# |\nstage ", text[start:])[0]


def rows(table: str) -> dict[str, list[str]]:
    """Cells of a printed table by their first one."""
    lines = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in table.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in lines}


def test_it_says_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_run_inputs(tmp_path), ["parallel.expert_parallel_size=2"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    text = describe(recipe)

    assert yaml.safe_load(section(text, "# recipe, resolved\n")) == yaml.safe_load(dump_recipe(recipe))
    deepspeed = json.loads(section(text, "# stage sparse: DeepSpeed, 2 process(es)\n"))
    assert deepspeed["gradient_accumulation_steps"] == 2
    assert deepspeed["zero_optimization"]["stage"] == 2

    dense, _ = build_dense(recipe.model, seed=0, dtype=torch.float32)
    select_trainable(dense, recipe.stages[0].train)
    for stage in recipe.stages:
        if stage.upcycle:
            upcycle(dense, recipe.moe)
            select_trainable(dense, stage.train)
        table = rows(section(text, f"stage {stage.name}: parameters"))
        count = sum(parameter.numel() for parameter in dense.parameters())
        trained = sum(parameter.numel() for parameter in dense.parameters() if parameter.requires_grad)
        assert table["all"][:2] == [f"{count:,}", f"{trained:,}"]
        assert ("experts" in table) == stage.upcycle
    assert rows(section(text, "stage sparse: parameters"))["experts"] == ["36,864", "36,864", "yes"]

    memory = rows(section(text, "stage sparse: memory of each of 2 process(es)"))
    assert set(memory) >= {"weights", "gradients", "optimizer and masters", "device"}
    assert list(tmp_path.glob("run*")) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.0.train=[moe]"], "'moe' names no parameter"),
        (["moe.layers=[7]"], "7 is not a layer of this model"),
        (["moe.fine_grained=4", "model.language_model.from_config.intermediate_size=50"], "does not divide"),
        (["stages.1.global_batch=10"], "global_batch"),
        (["stages.0.train=[conector]"], "unknown part 'conector'"),
    ],
)
def test_it_refuses_what_training_would(overrides: list[str], message: str, tmp_path: Path) -> None:
    recipe = load_recipe(write_run_inputs(tmp_path), overrides)
    with pytest.raises(ValueError, match=message):
        describe(recipe, world_size=4)


def test_the_launchers_world_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_run_inputs(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "DeepSpeed, 4 process(es)" in describe(recipe)
    assert "DeepSpeed, 1 process(es)" in describe(recipe, world_size=1)


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ("{kind: ltdr, eea_select: instruction_aware}", r"model\.attention: sdpa; .* allowed: eager"),
        ("{kind: task}", r"data\.task_types is empty"),
        ("{kind: cluster}", r"data\.clusters is not given"),
    ],
)
def test_what_a_router_lacks_is_said_before_anything_is_trained(tmp_path: Path, router: str, words: str) -> None:
    recipe = load_recipe(write_run_inputs(tmp_path), [f"moe.router={router}"])
    with pytest.raises(ValueError, match=words):
        describe(recipe, world_size=1)
