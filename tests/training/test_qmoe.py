"""Whole runs of a Q-MoE, begun from InstructBLIP's layout: topologies, resumes, evaluation, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import moe_lvlm
from moe_lvlm.analysis.run_folder import RunFolder
from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.config.load import load_recipe
from moe_lvlm.evaluation.runner import evaluate
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.training.dry_run import describe
from tests.tiny_run import write_qmoe_inputs
from tests.training.launching import Server, events, kill_after
from tests.training.states import assert_same_checkpoint

pytestmark = pytest.mark.distributed

LAST = "tune-000005"


@pytest.fixture(scope="module", params=["llama", "t5"])
def qmoe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe around either kind of language model, dropout on."""
    folder = tmp_path_factory.mktemp("qmoe")
    path = write_qmoe_inputs(folder, request.param)
    recipe = yaml.safe_load(path.read_text())
    recipe["model"]["connector"]["dropout"] = 0.1
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def whole(server: Server, qmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to: two processes, ZeRO 2. Not to be changed."""
    return run(server, qmoe, tmp_path_factory.mktemp("whole") / "run")


def run(server: Server, recipe: Path, folder: Path, *settings: str, world: int = 2) -> Path:
    server.run(["train", str(recipe), f"output_dir={folder}", *settings], world=world)
    return folder


def losses(folder: Path) -> list[float]:
    return events(folder).losses()


def assert_close(found: Sequence[float], expected: Sequence[float]) -> None:
    assert found == pytest.approx(expected, abs=1e-5)


def test_only_the_connector_is_trained(whole: Path) -> None:
    """And all of it is saved under InstructBLIP's names, the experts beside them."""
    before = open_source(Path(load_recipe(str(whole / "recipe.yaml")).model.from_pretrained or ""))
    after = open_source(whole / "checkpoints" / LAST)
    for name in before.names():
        if name.startswith(("vision_model.", "language_model.")):
            assert (after.read(name) == before.read(name)).all(), name
    moved = [name for name in before.names() if name in after.names() and (after.read(name) != before.read(name)).any()]
    assert {"query_tokens", "language_projection.weight"} <= set(moved)
    experts = [name for name in after.names() if ".experts." in name]
    assert len(experts) == 2 * 3 * 6  # layers, experts, tensors of an FFN with its norm
    start = before.read("qformer.encoder.layer.3.intermediate_query.dense.weight")
    assert any(
        (after.read(f"qformer.encoder.layer.3.experts.{expert}.intermediate_query.dense.weight") != start).any()
        for expert in range(3)
    )


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, ("stages.0.micro_batch=8",)),
        (2, ("parallel.deepspeed=zero3",)),
        (2, ("parallel.deepspeed=zero1", "train.gradient_checkpointing=true", "data.num_workers=1")),
    ],
    ids=["world1", "zero3", "zero1-checkpointed"],
)
def test_any_topology_trains_alike(
    server: Server, qmoe: Path, tmp_path: Path, world: int, settings: tuple[str, ...]
) -> None:
    """Of one global batch, dropout off: each process has its share of the samples, or one has them all."""
    still = "model.connector.dropout=0.0"
    two = run(server, qmoe, tmp_path / "two", still)
    other = run(server, qmoe, tmp_path / "other", still, *settings, world=world)
    assert_close(losses(other), losses(two))
    balance = [step["balance_loss"] for step in events(two).steps().values()]
    assert any(value > 0 for value in balance)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_killed_run_goes_on_exactly(server: Server, qmoe: Path, whole: Path, tmp_path: Path, zero: str) -> None:
    unbroken = whole if zero == "zero2" else run(server, qmoe, tmp_path / "unbroken", f"parallel.deepspeed={zero}")
    broken = tmp_path / "broken"
    command = ["train", str(qmoe), f"output_dir={broken}", f"parallel.deepspeed={zero}"]
    kill_after(server, command, broken, "tune", 2)
    server.run(command)
    assert events(broken).named("resume")
    assert events(broken).steps() == events(unbroken).steps()
    assert_same_checkpoint(broken / "checkpoints" / LAST, unbroken / "checkpoints" / LAST)


def test_a_run_is_evaluated_and_loads(whole: Path) -> None:
    scores = evaluate(whole)
    assert scores["colors"]["n"] == 40
    model, processor = moe_lvlm.load(whole)
    assert isinstance(model, MoEInstructBlipForConditionalGeneration)
    assert processor.qformer_tokenizer("what color")["input_ids"][0] == 1
    paths = RunFolder(whole).paths
    assert paths is not None
    answers = [json.loads(line) for line in (whole / "eval" / "colors" / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 40


def test_a_run_goes_on_from_another_runs_experts(server: Server, qmoe: Path, whole: Path, tmp_path: Path) -> None:
    """Also searched in another way, and with another loss: neither is a weight."""
    settings = (f"model.from_pretrained={whole}", "model.connector.experts.selection=greedy", "stages.0.steps=1")
    folder = run(server, qmoe, tmp_path / "next", *settings)
    assert losses(folder)[0] < losses(whole)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"connector": {"kind": "mlp"}}, "connector.kind: mlp, but .* has a Q-Former; allowed: qformer, qmoe, or null"),
        ({"connector": {"kind": "qmoe", "experts": {"num_layers": 5}}}, "connector.experts.num_layers: 5"),
        ({"connector": {"kind": "qmoe", "num_queries": 7}}, "connector.num_queries: 7, but .* has 3"),
        (
            {"connector": {"kind": "qmoe", "qformer": {"from_config": {}}}},
            "connector.qformer: from_pretrained brings the Q-Former",
        ),
        ({"connector": {"kind": "qmoe", "text_from": "{model}"}}, "which has a text side of its own"),
    ],
)
def test_refused(qmoe: Path, changes: dict[str, Any], message: str) -> None:
    recipe = yaml.safe_load(qmoe.read_text())
    changes = json.loads(json.dumps(changes).replace("{model}", recipe["model"]["from_pretrained"]))
    recipe["model"] |= changes
    path = qmoe.parent / "refused.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=message):
        describe(load_recipe(str(path)))


def test_upcycling_the_language_model_is_refused(qmoe: Path) -> None:
    with pytest.raises(ValueError, match=r"stage tune: upcycle: true, .* allowed in LLaVA only"):
        describe(load_recipe(str(qmoe), ["stages.0.upcycle=true"]))


def test_experts_of_another_shape_are_refused(qmoe: Path, whole: Path) -> None:
    settings = [f"model.from_pretrained={whole}", "model.connector.experts.num_experts=4"]
    with pytest.raises(ValueError, match=r"connector.experts.num_experts: 4, but .* has 3; allowed: that"):
        describe(load_recipe(str(qmoe), settings))
    with pytest.raises(ValueError, match=r"kind: qformer, but .* is a Q-MoE"):
        describe(load_recipe(str(qmoe), [settings[0], "model.connector={kind: qformer}"]))
