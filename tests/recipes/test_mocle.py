"""The rows of the MoCLE paper: each runs at both scales, and differs from its baseline in what the paper changes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.config.instructions import INSTRUCTION_SETS
from moe_lvlm.config.load import dump_recipe, list_recipes, load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.clusters import ClusterTable
from moe_lvlm.data.mixture import open_records, resolve_path, source_name
from moe_lvlm.data.packs import resolve

PLAIN, DEFAULT = "instructblip", "instructblip_mocle"
ADAPTED = {"stages.tune.adapt": True, "stages.tune.train": ["connector", "adapter"]}
LORA = {"kind": "lora", "target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 32.0, "dropout": 0.1}
LORA |= {"rslora": False, "start_from": None}
# Table 1 and the defaults of section 3 of the settings, by hand.
MOCLE = LORA | {
    "kind": "mocle",
    "num_experts": 4,
    "has_universal": True,
    "top_k": 1,
    "gating": "cluster",
    "temperature": 0.05,
    "noise": None,
    "num_clusters": 64,
    "embedding_width": 384,
    "compat": "paper",
}
ALONE = MOCLE | {"has_universal": False}
LLAVA_LORA = LORA | {"target_modules": ["up_proj", "down_proj"], "rank": 128, "alpha": 256.0, "dropout": 0.0}
LLAVA_MOCLE = MOCLE | LLAVA_LORA | {"kind": "mocle", "num_clusters": 4, "temperature": 0.1}
TABLE, MIXTURE = {"data.clusters": ...}, {"data.mixture": ...}


def adapter(settings: dict[str, Any]) -> dict[str, Any]:
    return {"model.adapter": settings}


# Row -> its baseline, and every key in which it differs from it, by hand from tables 1 and 4 to 7 and figure 3. ...: the
# value is another at every scale.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: (PLAIN, {}),
    "lora_r8": (PLAIN, adapter(LORA) | ADAPTED),
    "lora_r64": ("lora_r8", adapter(LORA | {"rank": 64, "alpha": 256.0})),
    DEFAULT: (PLAIN, adapter(MOCLE) | TABLE | ADAPTED),
    "no_universal": (DEFAULT, adapter(ALONE)),
    "top2": (DEFAULT, adapter(ALONE | {"top_k": 2})),
    "gating_token": ("no_universal", adapter(ALONE | {"gating": "token"}) | TABLE),
    "gating_sentence": ("no_universal", adapter(ALONE | {"gating": "sentence"}) | TABLE),
    "gating_dataset": ("no_universal", adapter(ALONE | {"gating": "dataset", "num_clusters": 13}) | TABLE),
    **{f"clusters_{number}": (DEFAULT, adapter(MOCLE | {"num_clusters": number}) | TABLE) for number in (4, 16, 256)},
    **{
        name: (DEFAULT, adapter(MOCLE | {"temperature": value}))
        for name, value in (("tau_001", 0.01), ("tau_01", 0.1), ("tau_02", 0.2))
    },
    **{f"experts_{number}": (DEFAULT, adapter(MOCLE | {"num_experts": number})) for number in (2, 8)},
    "llava_lora": ("llava_lora", {}),
    "llava_lora_665k": ("llava_lora", MIXTURE),
    "llava_lora_geo": ("llava_lora", MIXTURE),
    "llava_lora_med": ("llava_lora", MIXTURE),
    "llava_mocle": ("llava_lora", adapter(LLAVA_MOCLE) | TABLE),
}
# The rows of the experiment on a conflict, which is no table of the paper, in the same form.
SINGLE = LORA | {"target_modules": ["up_proj", "down_proj"], "dropout": 0.0}
OURS = MOCLE | SINGLE | {"kind": "mocle", "rank": 4, "alpha": 16.0, "num_clusters": 16, "temperature": 0.1}
CONFLICT: dict[str, tuple[str, dict[str, Any]]] = {
    "conflict_lora": ("conflict_lora", {}),
    "conflict_lora_wide": ("conflict_lora", adapter(SINGLE | {"rank": 27, "alpha": 108.0})),
    "conflict_mocle": ("conflict_lora", adapter(OURS) | TABLE),
    "conflict_dataset": ("conflict_mocle", adapter(OURS | {"gating": "dataset", "num_clusters": 4}) | TABLE),
    "conflict_sentence": ("conflict_mocle", adapter(OURS | {"gating": "sentence"}) | TABLE),
    "conflict_token": ("conflict_mocle", adapter(OURS | {"gating": "token"}) | TABLE),
}
ALL = ROWS | CONFLICT
SCALES = ("full", "tiny")
# Table 9: dataset -> template group; ok_vqg is no VQA, LLaVA-150K is asked as it stands.
GROUPS = {
    "capfilt": "mocle_cap",
    "coco_cap": "mocle_cap",
    "textcaps": "mocle_ocrcaps",
    "coco_vqa": "mocle_vqa",
    "coco_vqg": "mocle_vqg",
    "ok_vqa": "mocle_vqa",
    "ok_vqg": "mocle_vqg",
    "aok_vqa": "mocle_vqamc",
    "aok_vqg": "mocle_vqg",
    "ocr_vqa": "mocle_vqa",
    "llava_conversation": None,
    "llava_detail": None,
    "llava_reason": None,
}
REPEATS = {"llava_665k": 1, "geo170k_align": 2, "geo170k_qa": 2, "vqa_rad": 9, "slake": 9, "pathvqa": 9}


def load(name: str, scale: str = "full") -> Recipe:
    return load_recipe(f"mocle/{name}", [f"scale={scale}"])


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value; lists and the adapter's settings are values, stages are keys by name."""
    if path == "stages":
        value = {stage["name"]: stage for stage in value}
    if not isinstance(value, Mapping) or path == "model.adapter":
        yield path, value
        return
    for key, inner in value.items():
        yield from leaves(inner, f"{path}.{key}" if path else key)


def difference(recipe: Recipe, baseline: Recipe) -> dict[str, Any]:
    before, after = (dict(leaves(one.model_dump(mode="json", exclude={"name"}))) for one in (baseline, recipe))
    assert before.keys() == after.keys()
    return {key: value for key, value in after.items() if value != before[key]}


def test_the_rows_are_those_of_the_paper() -> None:
    assert [name for name in list_recipes() if name.startswith("mocle/")] == sorted(f"mocle/{name}" for name in ALL)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ALL)
def test_a_row_differs_from_its_baseline_in_what_the_paper_changes(name: str, scale: str) -> None:
    baseline, expected = ALL[name]
    found = difference(load(name, scale), load(baseline, scale))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value is ... or found[key] == value


@pytest.mark.parametrize("name", ALL)
def test_a_scale_does_not_change_what_is_studied(name: str) -> None:
    full, tiny = load(name, "full"), load(name, "tiny")
    assert full == load_recipe(f"mocle/{name}")
    assert full.name == tiny.name == name
    assert full.model.adapter == tiny.model.adapter
    assert (full.moe, full.parallel) == (tiny.moe, tiny.parallel)
    studied = [[(s.name, s.train, s.adapt, s.upcycle) for s in one.stages] for one in (full, tiny)]
    assert studied[0] == studied[1]
    assert full.data.template == tiny.data.template
    assert full.data.connector_words == tiny.data.connector_words
    assert (full.data.clusters is None) == (tiny.data.clusters is None)
    assert Recipe.model_validate(full.model_dump()) == full
    assert not {"extends", "scale", "scales"} & {line.partition(":")[0] for line in dump_recipe(tiny).splitlines()}


def test_llavas_default_is_table_1s() -> None:
    found = load("llava_mocle").model.adapter
    assert isinstance(found, MoCLESettings)
    assert found.model_dump(mode="json") == LLAVA_MOCLE
    single = load("llava_lora").model.adapter
    assert isinstance(single, LoRASettings)
    assert single.model_dump(mode="json") == LLAVA_LORA


def test_a_larger_rank_keeps_its_scale() -> None:
    scales = [one.scale for name in ("lora_r8", "lora_r64", DEFAULT) if (one := load(name).model.adapter) is not None]
    assert scales == [4.0, 4.0, 4.0]


def test_training_on_instructblip_is_appendix_a1s() -> None:
    recipe = load(DEFAULT)
    [stage] = recipe.stages
    assert (stage.steps, stage.global_batch, stage.learning_rate) == (60_000, 128, 1e-5)
    assert (recipe.train.optimizer.betas, recipe.train.optimizer.weight_decay) == ((0.9, 0.999), 0.05)
    schedule = recipe.train.schedule
    assert (schedule.kind, schedule.warmup_steps, schedule.warmup_from, schedule.final_ratio) == (
        "cosine",
        1000,
        1e-8,
        0,
    )


def test_training_on_llava_is_appendix_a2s() -> None:
    recipe = load("llava_mocle")
    align, tune = recipe.stages
    assert (align.train, align.adapt, align.template) == (("connector",), False, "plain")
    assert (tune.train, tune.adapt, tune.epochs) == (("connector", "adapter"), True, 1)
    assert (tune.global_batch, tune.learning_rate) == (128, 1e-4)
    assert recipe.train.optimizer.weight_decay == 0
    assert (recipe.train.schedule.warmup_ratio, recipe.train.schedule.final_ratio) == (0.03, 0)
    assert {source_name(source): source.weight for source in recipe.data.mixture} == REPEATS


def test_the_mix_of_instructblip_is_table_9s() -> None:
    mixture = load(DEFAULT).data.mixture
    assert {source_name(source): source.instructions for source in mixture} == GROUPS
    assert [source.turns for source in mixture if source.source == "llava_json"] == ["first"] * 3
    # as the square root of the numbers of records
    ratios = {source_name(source): source.ratio for source in mixture}
    assert all(ratio is not None for ratio in ratios.values())
    assert ratios["coco_vqa"] == ratios["coco_vqg"] == round(443_757**0.5)
    assert ratios["ok_vqa"] == ratios["ok_vqg"] == round(9_009**0.5)
    assert ratios["aok_vqa"] == ratios["aok_vqg"] == round(17_056**0.5)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llava_lora_665k", {"llava_665k"}),
        ("llava_lora_geo", {"geo170k_align", "geo170k_qa"}),
        ("llava_lora_med", {"vqa_rad", "slake", "pathvqa"}),
    ],
)
@pytest.mark.parametrize("scale", SCALES)
def test_a_single_domain_is_a_part_of_all(name: str, kept: set[str], scale: str) -> None:
    whole, part = load("llava_lora", scale).data.mixture, load(name, scale).data.mixture
    names = {source_name(source) for source in part}
    assert [source for source in whole if source_name(source) in names] == list(part)
    assert scale == "tiny" or names == kept


def test_evaluation_asks_with_the_templates_of_table_11() -> None:
    tasks = {task.name: task for task in load(DEFAULT).evaluation.tasks}
    assert set(tasks) == {
        *("flickr30k", "hateful_memes", "scienceqa", "iconqa", "vsr", "textvqa"),  # tables 5 to 7
        *("gqa", "mme", "pope_adversarial", "aokvqa_direct", "aokvqa_choice", "okvqa", "vqav2"),
    }
    asked = {name: INSTRUCTION_SETS[str(task.instructions)][0] for name, task in tasks.items() if task.instructions}
    short = "Question: {QUESTION} Short answer:"
    assert [asked[name] for name in ("gqa", "okvqa", "vqav2", "aokvqa_direct")] == [short] * 4
    assert asked["iconqa"] == asked["aokvqa_choice"] == "Question: {QUESTION} Options: {OPTIONS}. Short answer:"
    assert asked["textvqa"] == "OCR tokens: {OCR_TOKENS}. Question: {QUESTION} Short answer:"
    assert asked["scienceqa"] == "Context: {CONTEXT} Question: {QUESTION} Options: {OPTIONS}. Answer:"
    assert asked["flickr30k"] == "A short image description:"
    assert asked["vsr"] == asked["hateful_memes"] == "{QUESTION} Answer:"
    assert (tasks["flickr30k"].metric, tasks["scienceqa"].metric, tasks["textvqa"].metric) == ("cider", "choice", "vqa")


def test_evaluation_of_llava_has_table_4s_columns() -> None:
    names = {task.name for task in load("llava_mocle").evaluation.tasks}
    medical = {f"{name}_{kind}" for name in ("vqa_rad", "slake", "pathvqa") for kind in ("open", "closed")}
    assert names == {"mme", "mmbench", "scienceqa", "geoqa"} | medical


@pytest.mark.parametrize("name", [name for name in ALL if load(name, "tiny").data.clusters])
def test_a_tiny_rows_table_holds_all_that_is_asked(name: str) -> None:
    """So no encoder is needed; and the table is not larger than the adapter's."""
    recipe = load(name, "tiny")
    assert recipe.data.clusters is not None
    assert isinstance(recipe.model.adapter, MoCLESettings)
    table = ClusterTable.load(resolve_path(recipe.data.clusters, recipe.data.image_root))
    assert table.width == recipe.model.adapter.embedding_width
    assert table.num_clusters <= recipe.model.adapter.num_clusters
    if recipe.model.adapter.gating == "dataset":
        assert table.datasets == tuple(source_name(source) for source in recipe.data.mixture)
    else:
        assert (table.datasets, table.num_clusters) == (None, recipe.model.adapter.num_clusters)
    base = recipe.data.image_root
    sources = [open_records(source, base) for source in recipe.data.mixture]
    sources += [open_records(task, base, for_evaluation=True) for task in recipe.evaluation.tasks]
    for source in sources:
        for index in range(0, len(source), 7):
            assert all(table.find(text) is not None for text in source.instructions(index))


def test_tiny_asks_of_scenes_that_it_is_not_trained_on() -> None:
    for name in (DEFAULT, "llava_mocle"):
        recipe = load(name, "tiny")
        trained = {source.path for source in recipe.data.mixture}
        asked = {task.path for task in recipe.evaluation.tasks}
        assert not trained & asked
        assert all(resolve(path).is_file() for path in trained | asked)
