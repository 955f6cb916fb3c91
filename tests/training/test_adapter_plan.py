"""What a recipe with an adapter must say, found before anything is trained; and where tables of new adapters start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moe_lvlm
from moe_lvlm.config.errors import RecipeError
from moe_lvlm.models.build import open_weights
from moe_lvlm.training.build import run_processor
from moe_lvlm.training.dry_run import describe
from moe_lvlm.training.plan import check_data
from tests.adapted_run import write_adapted_run
from tests.tiny_run import tiny_recipe, write_run_inputs
from tests.training.launching import Server
from tests.training.test_clusters import QUESTIONS, still, write_table

ADAPTER: dict[str, Any] = {
    "kind": "mocle",
    "target_modules": ["q_proj", "up_proj"],
    "rank": 2,
    "num_experts": 3,
    "num_clusters": 3,
    "embedding_width": 26,
}


def adapted_recipe(folder: Path, *, adapter: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """One stage that puts an adapter into the dense model of the tiny run, and a table of clusters beside the data."""
    write_run_inputs(folder)
    write_table(folder / "clusters.safetensors", QUESTIONS)
    recipe = tiny_recipe(folder)
    recipe["model"]["adapter"] = ADAPTER | (adapter or {})
    recipe["data"]["clusters"] = "clusters.safetensors"
    recipe["stages"] = [recipe["stages"][0] | {"adapt": True, "train": ["adapter"]}]
    return recipe | changes


def load(recipe: dict[str, Any], folder: Path) -> moe_lvlm.config.recipe.Recipe:
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return moe_lvlm.load_recipe(path)


def check(recipe: dict[str, Any], folder: Path) -> str:
    """What `train` looks at before it touches the run's folder; the dry run's text."""
    loaded = load(recipe, folder)
    text = describe(loaded, world_size=1)
    check_data(loaded, run_processor(loaded))
    return text


@pytest.mark.parametrize("gating", ["cluster", "dataset", "sentence", "token"])
def test_a_right_recipe_passes(gating: str, tmp_path: Path) -> None:
    recipe = adapted_recipe(tmp_path, adapter={"gating": gating})
    if gating == "dataset":
        recipe["data"]["clusters"] = None
    check(recipe, tmp_path)


def test_where_there_is_no_stage_for_it_or_nothing_to_put(tmp_path: Path) -> None:
    recipe = adapted_recipe(tmp_path)
    stage = recipe["stages"][0]
    with pytest.raises(RecipeError, match=r"model\.adapter: no stage puts it into the model; allowed: adapt: true"):
        load(recipe | {"stages": [stage | {"adapt": False}]}, tmp_path)
    with pytest.raises(RecipeError, match="at most one stage may say adapt: true"):
        load(recipe | {"stages": [stage, stage | {"name": "again"}]}, tmp_path)
    later = stage | {"name": "later", "adapt": False, "upcycle": True, "train": ["moe"]}
    with pytest.raises(RecipeError, match="stage later: upcycle: true after adapt: true"):
        load(recipe | {"stages": [stage, later]}, tmp_path)
    del recipe["model"]["adapter"]
    with pytest.raises(RecipeError, match=r"adapt: true, but model\.adapter is not given"):
        load(recipe, tmp_path)


def test_what_the_gates_go_by_must_be_given(tmp_path: Path) -> None:
    recipe = adapted_recipe(tmp_path)
    recipe["data"]["clusters"] = None
    with pytest.raises(ValueError, match=r"model\.adapter\.gating: cluster, but data\.clusters is not given"):
        check(recipe, tmp_path)
    two = [{"path": "train.json"}, {"path": "train.json", "name": "again"}]
    recipe = adapted_recipe(tmp_path, adapter={"gating": "dataset", "num_clusters": 1})
    recipe["data"] |= {"clusters": None, "mixture": two}
    with pytest.raises(ValueError, match=r"num_clusters: 1, but stage tune mixes 2 datasets.*allowed: 2 or more"):
        check(recipe, tmp_path)


def test_a_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"adapter\.embedding_width: 25, but the centres of data\.clusters are 26 wide"
    ):
        check(adapted_recipe(tmp_path, adapter={"embedding_width": 25}), tmp_path)
    with pytest.raises(ValueError, match=r"adapter\.num_clusters: 1, but data\.clusters holds 2 clusters"):
        check(adapted_recipe(tmp_path, adapter={"num_clusters": 1}), tmp_path)


def test_an_instruction_without_a_cluster_needs_the_encoder(tmp_path: Path) -> None:
    recipe = adapted_recipe(tmp_path)
    write_table(tmp_path / "clusters.safetensors", {"say hello": 8})
    with pytest.raises(ValueError, match="nowhere/letters"):
        check(recipe, tmp_path)


def test_targets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter\.target_modules: 'query' names no linear layer"):
        check(adapted_recipe(tmp_path, adapter={"target_modules": ["query"]}), tmp_path)


def test_a_run_that_has_adapters_takes_no_others(tmp_path: Path) -> None:
    run = write_adapted_run(tmp_path / "first", ADAPTER | {"target_modules": ["q_proj"]})
    recipe = adapted_recipe(tmp_path)
    recipe["model"] = {"from_pretrained": str(run), "adapter": recipe["model"]["adapter"]}
    with pytest.raises(ValueError, match="stage tune: adapt: true, but the model it starts from has adapters already"):
        check(recipe, tmp_path)
    # without new ones it goes on with its own
    del recipe["model"]["adapter"]
    recipe["stages"][0] |= {"adapt": False}
    text = check(recipe, tmp_path)
    assert "adapters" in text


@pytest.mark.distributed
def test_tables_start_at_the_centres_and_learn(server: Server, tmp_path: Path) -> None:
    """In memory at once, and from a checkpoint's files after a dense stage; what is not trained stays as it was."""
    plain = adapted_recipe(tmp_path)
    centres = torch.from_numpy(write_table(tmp_path / "clusters.safetensors", QUESTIONS))
    dense = tiny_recipe(tmp_path)["stages"][0] | {"steps": 1}
    begins = still(plain["stages"][0]) | {"name": "adapt"}
    goes_on = begins | {"name": "then", "adapt": False, "steps": 2, "learning_rate": 1e-2}
    stages = {"first": [begins, goes_on], "after": [dense, begins]}
    for name, value in stages.items():
        recipe = plain | {"stages": value, "output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    server.run(["train_several", *(str(tmp_path / f"{name}.yaml") for name in stages)], world=0)
    for name in stages:
        weights = read_all(tmp_path / name / "checkpoints" / "adapt-000001")
        [table] = [weight for key, weight in weights.items() if key.endswith(".adapter_table.weight")]
        assert torch.allclose(table[:2], centres, atol=1e-9)
        assert table[2].tolist() == [0.0] * 26
    before, after = (read_all(tmp_path / "first" / "checkpoints" / one) for one in ("adapt-000001", "then-000002"))
    is_moved = {key for key in before if not torch.equal(before[key], after[key])}
    leaves = ("lora_A", "lora_B", "gate.weight", "adapter_table.weight")
    assert is_moved == {key for key in before if key.endswith(leaves)}


def read_all(checkpoint: Path) -> dict[str, torch.Tensor]:
    source = open_weights(checkpoint)
    return {name: source.read(name) for name in source.names()}
