"""The rows of the Q-MoE paper: each runs at both scales, and differs from its baseline in what the paper changes alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe_lvlm.config.connector import ExpertSettings, QFormerConnectorSettings, QMoEConnectorSettings
from moe_lvlm.config.load import RecipeError, dump_recipe, list_recipes, load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.packs import resolve
from moe_lvlm.training.build import run_processor
from moe_lvlm.training.plan import check_data, plan_stages
from tests.recipes.leaves import leaves

VICUNA, T5 = "qformer_vicuna", "qformer_flan_t5"
# Q-MoE section 4.1: 3 experts and 1 general one in the top 6 layers, K = 3, Cross-Router; SPEC for what it leaves open.
DEFAULT = {
    "num_experts": 3,
    "has_general_expert": True,
    "num_layers": 6,
    "router": "cross",
    "selection": "path",
    "num_paths": 3,
    "normalize_output": False,
    "noise": None,
    "importance_coefficient": 0.01,
}
QMOE = {"model.connector.kind": "qmoe", "model.connector.experts": DEFAULT}
MIXTURE = {"data.mixture": ...}

# Row -> its baseline, and every key in which it differs from it, by hand from tables 1 and 3 to 6. ...: the value is
# another at every scale.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    VICUNA: (VICUNA, {}),
    T5: (T5, {}),
    "qmoe_vicuna": (VICUNA, QMOE),
    "qmoe_flan_t5": (T5, QMOE),
    "greedy": ("qmoe_vicuna", {"model.connector.experts": DEFAULT | {"selection": "greedy"}}),
    "post": ("qmoe_vicuna", {"model.connector.experts": DEFAULT | {"router": "post"}}),
    "pre": ("qmoe_vicuna", {"model.connector.experts": DEFAULT | {"router": "pre"}}),
    "cls": ("qmoe_vicuna", {"model.connector.experts": DEFAULT | {"router": "cls"}}),
    "experts_3": ("qmoe_vicuna", {"model.connector.experts": DEFAULT | {"has_general_expert": False}}),
    "experts_2_1": ("qmoe_vicuna", {"model.connector.experts": DEFAULT | {"num_experts": 2}}),
    "experts_4": (
        "qmoe_vicuna",
        {"model.connector.experts": DEFAULT | {"num_experts": 4, "has_general_expert": False}},
    ),
    "experts_7_1": ("qmoe_vicuna", {"model.connector.experts": DEFAULT | {"num_experts": 7}}),
    "mix_vqa_qformer": (VICUNA, MIXTURE),
    "mix_vqa_qmoe": ("mix_vqa_qformer", QMOE),
    "mix_aokvqa_qformer": (VICUNA, MIXTURE),
    "mix_aokvqa_qmoe": ("mix_aokvqa_qformer", QMOE),
    "mix_coco_qformer": (VICUNA, MIXTURE),
    "mix_coco_qmoe": ("mix_coco_qformer", QMOE),
}
# Supplement, table 2: shares, in the order in which table 6 takes the sets up.
RATIOS = {"gqa": 10, "okvqa": 1, "vqav2": 9, "aokvqa": 2, "coco": 7, "textcaps": 4}
NUM_SETS = {"mix_vqa": 3, "mix_aokvqa": 4, "mix_coco": 5}
# What stands in for them at tiny scale.
SCENES = {"mix_vqa": ["vqa"], "mix_aokvqa": ["vqa", "choice"], "mix_coco": ["vqa", "choice", "caption"]}
SCALES = ("full", "tiny")


def load(name: str, scale: str) -> Recipe:
    return load_recipe(f"qmoe/{name}", [f"scale={scale}"])


def difference(recipe: Recipe, baseline: Recipe) -> dict[str, Any]:
    before, after = (
        dict(leaves(one.model_dump(mode="json", exclude={"name"}), whole="model.connector.experts"))
        for one in (baseline, recipe)
    )
    assert before.keys() <= after.keys()
    return {key: value for key, value in after.items() if key not in before or value != before[key]}


def experts(name: str, scale: str = "full") -> ExpertSettings:
    connector = load(name, scale).model.connector
    assert isinstance(connector, QMoEConnectorSettings)
    return connector.experts


def test_the_rows_are_those_of_the_paper() -> None:
    assert [name for name in list_recipes() if name.startswith("qmoe/")] == sorted(f"qmoe/{name}" for name in ROWS)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_differs_from_its_baseline_in_what_the_paper_changes(name: str, scale: str) -> None:
    baseline, expected = ROWS[name]
    found = difference(load(name, scale), load(baseline, scale))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value is ... or found[key] == value


@pytest.mark.parametrize("name", ROWS)
def test_a_scale_does_not_change_what_is_studied(name: str) -> None:
    full, tiny = load(name, "full"), load(name, "tiny")
    assert full == load_recipe(f"qmoe/{name}")
    assert full.name == tiny.name == name
    assert full.model.connector == tiny.model.connector
    assert (full.moe, full.parallel) == (tiny.moe, tiny.parallel)
    assert [(s.name, s.train, s.upcycle) for s in full.stages] == [(s.name, s.train, s.upcycle) for s in tiny.stages]
    assert [(s.name, s.train, s.upcycle) for s in full.stages] == [("tune", ("connector",), False)]
    assert full.data.template == tiny.data.template == "instruct"
    assert Recipe.model_validate(full.model_dump()) == full
    assert not {"extends", "scale", "scales"} & {line.partition(":")[0] for line in dump_recipe(tiny).splitlines()}


def test_baselines_are_plain_q_formers_of_two_language_models() -> None:
    for name in (VICUNA, T5):
        assert load(name, "full").model.connector == QFormerConnectorSettings()
    assert difference(load(T5, "full"), load(VICUNA, "full")) == {
        "model.from_pretrained": "data/qmoe/models/flan_t5_xxl_pretrained"
    }
    assert difference(load(T5, "tiny"), load(VICUNA, "tiny")) == {
        "model.from_pretrained": "package:scene_tasks/instructblip_t5"
    }


@pytest.mark.parametrize(
    ("name", "num_experts", "has_general"),
    [
        ("experts_3", 3, False),
        ("experts_2_1", 2, True),
        ("experts_4", 4, False),
        ("qmoe_vicuna", 3, True),
        ("experts_7_1", 7, True),
    ],
)
def test_table_5_counts_its_experts(name: str, num_experts: int, has_general: bool) -> None:
    assert (experts(name).num_experts, experts(name).has_general_expert) == (num_experts, has_general)


def test_the_default_is_the_papers() -> None:
    assert experts("qmoe_vicuna").model_dump() == DEFAULT
    assert experts("qmoe_vicuna").noise_std == pytest.approx(1 / math.sqrt(3))


def test_training_at_full_size_is_the_papers() -> None:
    """Supplement, tables 1 and 2."""
    recipe = load("qmoe_vicuna", "full")
    [stage] = recipe.stages
    assert (stage.steps, stage.micro_batch, stage.global_batch, stage.learning_rate) == (50_000, 32, 4 * 32, 5e-5)
    assert (recipe.train.optimizer.betas, recipe.train.optimizer.weight_decay) == ((0.9, 0.999), 0.05)
    schedule = recipe.train.schedule
    assert (schedule.kind, schedule.warmup_steps, schedule.warmup_from) == ("cosine", 600, 1e-6)
    assert schedule.final_ratio * stage.learning_rate == pytest.approx(1e-6)
    assert {source.name: source.ratio for source in recipe.data.mixture} == RATIOS
    assert [source.instructions for source in recipe.data.mixture] == ["vqa"] * 3 + ["choice"] + ["caption"] * 2


def test_a_warm_up_does_not_begin_above_the_learning_rate() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("qmoe/qmoe_vicuna", ["stages.0.learning_rate=0.0000001"])
    assert str(caught.value).endswith(
        "_qmoe.yaml: train.schedule.warmup_from: 1e-06 is above the learning rate of stage tune (1e-07)"
    )


def test_evaluation_has_the_sets_of_tables_1_and_2() -> None:
    recipe = load("qmoe_vicuna", "full")
    held_out = ["vizwiz", "vsr", "hateful_memes", "nocaps"]
    assert [task.name for task in recipe.evaluation.tasks] == [*RATIOS, *held_out]
    trained = {source.path for source in recipe.data.mixture}
    assert not trained & {task.path for task in recipe.evaluation.tasks}
    metrics = {task.name: task.metric for task in recipe.evaluation.tasks}
    assert {name for name, metric in metrics.items() if metric == "cider"} == {"coco", "textcaps", "nocaps"}
    assert {name for name, metric in metrics.items() if metric == "vqa"} == {"gqa", "okvqa", "vqav2", "vizwiz"}
    assert (metrics["aokvqa"], metrics["vsr"], metrics["hateful_memes"]) == ("choice", "yes_no", "yes_no")


@pytest.mark.parametrize("kind", ["qformer", "qmoe"])
@pytest.mark.parametrize("mix", NUM_SETS)
def test_table_6_takes_sets_up_one_after_another(mix: str, kind: str) -> None:
    whole, part = load("qmoe_vicuna", "full"), load(f"{mix}_{kind}", "full")
    assert part.data.mixture == whole.data.mixture[: NUM_SETS[mix]]
    assert part.evaluation == whole.evaluation
    whole, part = load("qmoe_vicuna", "tiny"), load(f"{mix}_{kind}", "tiny")
    assert [source.name for source in part.data.mixture] == SCENES[mix]
    assert [source for source in whole.data.mixture if source.name in SCENES[mix]] == list(part.data.mixture)
    assert part.evaluation == whole.evaluation


def test_tiny_asks_all_four_tasks_of_scenes_that_it_is_not_trained_on() -> None:
    recipe = load("qmoe_vicuna", "tiny")
    assert [source.name for source in recipe.data.mixture] == ["vqa", "choice", "caption", "ocr"]
    assert [task.name for task in recipe.evaluation.tasks] == ["vqa", "choice", "caption", "ocr"]
    assert {source.source for source in recipe.data.mixture} == {"vqa", "aokvqa", "coco_captions", "textcaps"}
    for source, task in zip(recipe.data.mixture, recipe.evaluation.tasks, strict=True):
        assert (source.source, source.instructions) == (task.source, task.instructions)
        assert resolve(source.path).is_file()
        assert resolve(task.path).is_file()
        assert source.path != task.path


@pytest.mark.parametrize("name", ROWS)
def test_a_tiny_row_can_be_built(name: str) -> None:
    """On meta tensors, and every file of records is there; more experts have more to train."""
    recipe = load(name, "tiny")
    [plan] = plan_stages(recipe, world_size=1)
    trained = {group.name for group in plan.groups if group.trainable}
    assert trained == ({"connector"} if "qformer" in name else {"connector", "connector's experts", "routers"})
    check_data(recipe, run_processor(recipe))
