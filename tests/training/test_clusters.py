"""Runs whose routers go by clusters of instructions: they start at the centres, and mistakes are found first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import moe_lvlm
from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.data.clustering import fit_clusters
from moe_lvlm.training.build import run_processor
from moe_lvlm.training.dry_run import describe
from moe_lvlm.training.plan import check_data
from tests.data.letters import encode
from tests.tiny_run import tiny_recipe, write_run_inputs
from tests.training.launching import Server, events

# The first questions of the tiny run's records.
QUESTIONS = {"what color is it ?": 32, "say hello": 8}
ROUTER = {"kind": "cluster", "num_clusters": 3, "embedding_width": 26}


def cluster_recipe(folder: Path, *, router: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The tiny recipe with cluster routers, and its table beside the data; the encoder is one that is nowhere."""
    write_run_inputs(folder)
    write_table(folder / "clusters.safetensors", QUESTIONS)
    recipe = tiny_recipe(folder)
    recipe["moe"] = {"num_experts": 4, "top_k": 2, "router": ROUTER | (router or {}), "balance": {"on": []}}
    recipe["data"]["clusters"] = "clusters.safetensors"
    return recipe | changes


def write_table(path: Path, counts: dict[str, int]) -> np.ndarray[Any, Any]:
    table = fit_clusters(counts, encode, encoder="nowhere/letters", num_clusters=len(counts), seed=0)
    table.save(path)
    return table.centres_KW


def write(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def embeddings(checkpoint: Path) -> list[torch.Tensor]:
    source = open_source(checkpoint)
    return [source.read(name) for name in sorted(source.names()) if name.endswith(".router.embedding.weight")]


def still(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage that moves no weight by more than rounding."""
    return stage | {"steps": 1, "learning_rate": 1e-12}


@pytest.mark.distributed
def test_routers_start_at_the_centres_and_learn(server: Server, tmp_path: Path) -> None:
    """After a dense stage and at once, from a checkpoint's files and in memory."""
    plain = cluster_recipe(tmp_path)
    centres = torch.from_numpy(write_table(tmp_path / "clusters.safetensors", QUESTIONS))
    dense, sparse = plain["stages"]
    then = sparse | {"name": "then", "upcycle": False, "steps": 2}
    stages = {"after": [dense, still(sparse)], "first": [still(sparse), then]}
    paths = [
        write(tmp_path / f"{name}.yaml", plain | {"stages": value, "output_dir": str(tmp_path / name)})
        for name, value in stages.items()
    ]
    server.run(["train_several", *paths], world=0)
    for name in stages:
        started = embeddings(tmp_path / name / "checkpoints" / "sparse-000001")
        assert len(started) == 2
        for weight in started:
            assert torch.allclose(weight[:2], centres, atol=1e-9)
            assert weight[2].tolist() == [0.0] * 26
    # A stage that does not upcycle goes on from where they are.
    for weight in embeddings(tmp_path / "first" / "checkpoints" / "then-000002"):
        assert (weight[:2] - centres).abs().max() > 1e-3
        assert weight[2].tolist() == [0.0] * 26
    assert all(np.isfinite(line["loss"]) for line in events(tmp_path / "first").named("step"))


def check(recipe: dict[str, Any], path: Path) -> None:
    """What `train` looks at before it touches the run's folder."""
    loaded = moe_lvlm.load_recipe(write(path, recipe))
    describe(loaded, world_size=1)
    check_data(loaded, run_processor(loaded))


def test_a_recipe_without_mistake(tmp_path: Path) -> None:
    check(cluster_recipe(tmp_path), tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router": {"embedding_width": 384}}, r"embedding_width: 384, but .* are 26 wide"),
        ({"router": {"num_clusters": 1}}, r"num_clusters: 1, but data\.clusters holds 2"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        check(cluster_recipe(tmp_path, **changes), tmp_path / "r.yaml")


def test_data_that_a_router_needs_and_that_are_not_there(tmp_path: Path) -> None:
    recipe = cluster_recipe(tmp_path)
    clusters = recipe["data"].pop("clusters")
    with pytest.raises(ValueError, match=r"cluster, but data\.clusters is not given"):
        check(recipe, tmp_path / "r.yaml")
    recipe["data"]["clusters"] = "none.safetensors"
    with pytest.raises(ValueError, match=r"none\.safetensors: no such file"):
        check(recipe, tmp_path / "r.yaml")

    recipe["data"]["clusters"] = clusters
    recipe["moe"]["router"] = {"kind": "task"}
    with pytest.raises(ValueError, match=r"task, but data\.task_types is empty"):
        check(recipe, tmp_path / "r.yaml")
    recipe["data"]["task_types"] = [{"label": 0}, {"label": 4}]
    with pytest.raises(ValueError, match=r"data\.task_types\.1\.label: 4; allowed: 0 to 3"):
        check(recipe, tmp_path / "r.yaml")


def test_unknown_instructions_without_encoder_are_found_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    recipe = cluster_recipe(tmp_path)
    write_table(tmp_path / "clusters.safetensors", {"what color is it ?": 1, "other": 1})
    with pytest.raises(ValueError, match=r"does not hold the instruction 'say hello'.* encoder 'nowhere/letters'"):
        check(recipe, tmp_path / "r.yaml")
    # a dense stage may ask what it likes
    recipe["stages"][0]["mixture"] = [{"path": "train.json"}]
    recipe["stages"][1]["mixture"] = [{"path": "colors.json"}]
    (tmp_path / "colors.json").write_text(
        '[{"conversations": [{"from": "human", "value": "what color is it ?"}, {"from": "gpt", "value": "red"}]}]'
    )
    check(recipe, tmp_path / "r.yaml")
