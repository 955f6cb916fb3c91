"""Recipes that extend recipes, scales laid over them, and errors that name the file where a key stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lvlm.config.files import RECIPES, list_scales
from moe_lvlm.config.load import dump_recipe, list_recipes, load_recipe
from tests.config.test_load import error_of

BASE = """
name: base
model:
  vision_tower: {from_pretrained: tower, feature_layer: -1}
  language_model: {from_pretrained: llm}
moe: {num_experts: 4, top_k: 2, router: {kind: ltdr, tail_k: 3, renormalize: false}}
data: {mixture: [{path: one.json}, {path: two.json}], image_root: images}
train: {schedule: {kind: cosine, warmup_ratio: 0.1}}
stages:
  - {name: tune, train: [connector], steps: 3, micro_batch: 2, global_batch: 8, learning_rate: 1e-3}
  - {name: sparse, upcycle: true, train: [moe], steps: 5, learning_rate: 1e-4}
scale: full
"""


def write(folder: Path, **files: str) -> Path:
    """The files, each as <name>.yaml; the last one's path."""
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
    return path


def test_mappings_merge_and_all_else_replaces(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        base=BASE,
        heir="extends: base.yaml\nname: heir\nmoe: {top_k: 1, router: {tail_k: 2}}\ndata: {mixture: [{path: three.json}]}",
    )
    recipe, base = load_recipe(path), load_recipe(tmp_path / "base.yaml")
    assert recipe.name == "heir"
    assert (recipe.moe.num_experts, recipe.moe.top_k) == (4, 1)
    assert recipe.moe.router.model_dump()["tail_k"] == 2
    assert recipe.moe.router.renormalize is False  # of the base's router, whose kind stays
    assert [source.path for source in recipe.data.mixture] == ["three.json"]
    assert recipe.data.image_root == "images"
    assert (recipe.model, recipe.train, recipe.stages) == (base.model, base.train, base.stages)


def test_a_mapping_of_another_kind_replaces(tmp_path: Path) -> None:
    """tail_k is no key of top_k and would be an error; warmup_ratio would be left behind."""
    path = write(
        tmp_path,
        base=BASE,
        heir="extends: base.yaml\nmoe: {router: {kind: top_k}}\ntrain: {schedule: {kind: linear, warmup_steps: 7}}",
        same="extends: base.yaml\nmoe: {router: {kind: ltdr, eea_select: vision_head}}",
    )
    recipe = load_recipe(tmp_path / "heir.yaml")
    assert recipe.moe.router.model_dump(exclude_defaults=True) == {}
    assert recipe.moe.router.kind == "top_k"
    assert (recipe.train.schedule.warmup_ratio, recipe.train.schedule.warmup_steps) == (0.03, 7)
    assert load_recipe(path).moe.router.model_dump(exclude_defaults=True) == {
        "tail_k": 3,
        "renormalize": False,
        "eea_select": "vision_head",
    }


def test_stages_by_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        base=BASE,
        heir="extends: base.yaml\nstages: {sparse: {steps: null, epochs: 2, train: [router]}}",
        list="extends: base.yaml\nstages: [{name: only, train: [connector], steps: 1, learning_rate: 1}]",
    )
    base, stages = load_recipe(tmp_path / "base.yaml").stages, load_recipe(tmp_path / "heir.yaml").stages
    assert stages[0] == base[0]
    assert stages[1] == base[1].model_copy(update={"steps": None, "epochs": 2.0, "train": ("router",)})
    assert [stage.name for stage in load_recipe(path).stages] == ["only"]


def test_a_chain_and_fragments(tmp_path: Path) -> None:
    """Each file is looked for beside the file that names it; a name is looked for among the shipped recipes."""
    (tmp_path / "deep").mkdir()
    write(tmp_path, _part=BASE.replace("scale: full", ""))
    write(tmp_path / "deep", middle="extends: ../_part.yaml\nname: middle\nseed: 1\noutput_dir: a")
    path = write(tmp_path, top="extends: deep/middle.yaml\nname: top\nseed: 2")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed, recipe.output_dir, recipe.moe.top_k) == ("top", 2, "a", 2)
    mine = load_recipe(write(tmp_path, mine="extends: quickstart\nname: mine"))
    assert mine == load_recipe("quickstart").model_copy(update={"name": "mine"})


def test_a_resolved_recipe_holds_no_trace(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE, heir="extends: base.yaml\nscales: {full: {data: {max_length: 99}}}")
    recipe = load_recipe(path)
    text = dump_recipe(recipe)
    assert not {"extends", "scale", "scales"} & {line.partition(":")[0] for line in text.splitlines()}
    assert load_recipe(write(tmp_path, again=text)) == recipe


def test_anchors_do_not_tie_layers_together(tmp_path: Path) -> None:
    text = BASE.replace("name: tune, ", "name: tune, mixture: &m [{path: a.json}], ").replace(
        "name: sparse, ", "name: sparse, mixture: *m, "
    )
    path = write(tmp_path, base=text, heir="extends: base.yaml")
    recipe = load_recipe(path, ["stages.0.mixture.0.path=b.json"])
    assert [stage.mixture[0].path for stage in recipe.stages if stage.mixture] == ["b.json", "a.json"]


def test_scales_are_laid_over_in_order(tmp_path: Path) -> None:
    """The shipped overlay, the base's own, the recipe's own, the overrides: each over what comes before."""
    own = "scales: {tiny: {data: {max_length: 11, num_workers: 1}, stages: {tune: {steps: 1}}}}"
    base = BASE.replace("data: {", "data: {num_workers: 7, ").replace("train: {", "train: {precision: bf16, ") + own
    path = write(tmp_path, base=base, heir="extends: base.yaml\nscales: {tiny: {data: {max_length: 12}}}")
    full = load_recipe(path)
    assert (full.data.max_length, full.data.num_workers, full.stages[0].steps) == (2048, 7, 3)
    assert full.train.precision == "bf16"
    tiny = load_recipe(path, ["train.log_every=3", "scale=tiny"])
    assert tiny.train.precision == "fp32"  # scales/tiny.yaml
    assert (tiny.data.max_length, tiny.data.num_workers) == (12, 1)
    assert (tiny.stages[0].steps, tiny.train.log_every) == (1, 3)
    assert tiny.moe == full.moe


@pytest.mark.parametrize("key", ["num_experts", "has_general_expert", "router", "selection", "num_paths", "noise"])
def test_a_scale_changes_no_expert_of_a_connector(tmp_path: Path, key: str) -> None:
    """Their layers alone, of which a small model has fewer, and how large the connector is."""
    base = BASE.replace(
        "\nmodel:", "\nmodel:\n  connector: {kind: qmoe, qformer: {from_pretrained: q}, experts: {num_experts: 2}}"
    )
    changes = "{num_queries: 4, experts: {num_layers: 1}}"
    path = write(tmp_path, base=base, heir=f"extends: base.yaml\nscales: {{s: {{model: {{connector: {changes}}}}}}}")
    full, small = (load_recipe(path, words).model.connector for words in ([], ["scale=s"]))
    assert full is not None
    assert small is not None
    assert small.model_dump() == full.model_dump() | {
        "num_queries": 4,
        "experts": full.model_dump()["experts"] | {"num_layers": 1},
    }
    path.write_text(f"extends: base.yaml\nscales: {{s: {{model: {{connector: {{experts: {{{key}: 1}}}}}}}}}}")
    assert f"model.connector.experts.{key}: a scale does not change this" in error_of(path)


def test_a_recipe_may_bring_a_scale_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE + "scales: {small: {stages: {tune: {steps: 1}}}}", heir="extends: base.yaml")
    assert load_recipe(path).stages[0].steps == 3
    assert load_recipe(path, ["scale=small"]).stages[0].steps == 1
    assert load_recipe(write(tmp_path, other="extends: heir.yaml\nscale: small")).stages[0].steps == 1
    assert "allowed: full, small, tiny" in error_of(path, "scale=medium")


def test_the_last_scale_counts_and_full_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE)
    assert load_recipe(path) == load_recipe(path, ["scale=full"]) == load_recipe(path, ["scale=tiny", "scale=full"])


def test_what_is_no_recipe_is_not_listed() -> None:
    assert set(list_scales()) == {"full", "tiny"}
    names = list_recipes()
    assert "quickstart" in names
    assert "ltdr/dar" in names
    assert not [name for name in names if "_moe_llava" in name or "scales" in name]
    assert (RECIPES / "ltdr" / "_moe_llava.yaml").is_file()
    assert "unknown recipe" in error_of("ltdr/_moe_llava")
    assert "unknown recipe" in error_of("scales/tiny")


@pytest.mark.parametrize(
    ("heir", "expected"),
    [
        ("extends: bse.yaml", "heir.yaml: extends: 'bse.yaml': no such file in {folder}"),
        (
            "extends: quickstrt",
            "heir.yaml: extends: 'quickstrt': no such recipe, did you mean 'quickstart'?; allowed: ",
        ),
        ("extends: 3", "heir.yaml: extends: 3: no such recipe"),
        ("extends: [base.yaml]", "heir.yaml: extends: ['base.yaml']: no such recipe"),
        ("extends: heir.yaml", "heir.yaml: extends: a circle: {folder}/heir.yaml -> {folder}/heir.yaml"),
        ("extends: base.yaml\nseeed: 1", "heir.yaml: seeed: unknown key, did you mean 'seed'?"),
        ("extends: base.yaml\nmoe: {top_k: 5}", "heir.yaml: moe.top_k: 5 is above num_experts (4)"),
        ("extends: base.yaml\nmoe: {num_experts: 1}", "base.yaml: moe.top_k: 2 is above num_experts (1)"),
        ("extends: base.yaml\nstages: {tun: {steps: 1}}", "heir.yaml: stages.tun: no such stage, did you mean 'tune'?"),
        ("extends: base.yaml\nstages: {tune: 1}", "heir.yaml: stages.tune: 1; allowed: a mapping"),
        ("extends: base.yaml\nstages: {tune: {step: 1}}", "heir.yaml: stages.0.step: unknown key"),
        (
            "extends: base.yaml\nstages: {tune: {micro_batch: 3}}",
            "base.yaml: stages.0.global_batch: 8 is not a multiple",
        ),
        ("stages: {tune: {steps: 1}}", "heir.yaml: stages: a mapping changes stages by name"),
        ("extends: base.yaml\nscale: tinny", "heir.yaml: scale: 'tinny', did you mean 'tiny'?; allowed: full, tiny"),
        ("extends: base.yaml\nscale: [tiny]", "heir.yaml: scale: ['tiny'], did you mean 'tiny'?; allowed: full, tiny"),
        (
            "extends: base.yaml\nscale: s\nscales: {s: {stages: {align: {steps: 1}}}}",
            "heir.yaml: stages.align: no such stage; allowed: tune, sparse",
        ),
        ("extends: base.yaml\nscales: [tiny]", "heir.yaml: scales: ['tiny']; allowed: a mapping"),
        ("extends: base.yaml\nscales: {tiny: 3}", "heir.yaml: scales.tiny: 3; allowed: a mapping"),
        ("extends: base.yaml\nscales: {full: {data: {max_lenght: 9}}}", "heir.yaml: data.max_lenght: unknown key"),
        # what a scale may not change, found whichever scale is used
        (
            "extends: base.yaml\nscales: {tiny: {moe: {top_k: 1}}}",
            "heir.yaml: scales.tiny: moe: a scale does not change",
        ),
        ("extends: base.yaml\nscales: {tiny: {parallel: {}}}", "heir.yaml: scales.tiny: parallel: a scale does not"),
        ("extends: base.yaml\nscales: {tiny: {seed: 1}}", "heir.yaml: scales.tiny: seed: a scale does not change this"),
        ("extends: base.yaml\nscales: {tiny: {data: null}}", "heir.yaml: scales.tiny: data: null; allowed in a scale"),
        ("extends: base.yaml\nscales: {tiny: {stages: []}}", "heir.yaml: scales.tiny: stages: []; allowed in a scale"),
        (
            "extends: base.yaml\nscales: {tiny: {model: {connector: {kind: mlp}}}}",
            "heir.yaml: scales.tiny: model.connector.kind: a scale does not change this; allowed: model.connector.qformer, ",
        ),
        (
            "extends: base.yaml\nscales: {tiny: {model: {connector: null}}}",
            "heir.yaml: scales.tiny: model.connector: null; allowed in a scale: a mapping",
        ),
        (
            "extends: base.yaml\nscales: {tiny: {model: {connector: {experts: {num_experts: 2}}}}}",
            "heir.yaml: scales.tiny: model.connector.experts.num_experts: a scale does not change this, did you mean 'num_layers'?; allowed: "
            "model.connector.experts.num_layers",
        ),
        (
            "extends: base.yaml\nscales: {tiny: {model: {connector: {experts: 2}}}}",
            "heir.yaml: scales.tiny: model.connector.experts: 2; allowed in a scale: a mapping",
        ),
        (
            "extends: base.yaml\nscales: {tiny: {train: {loss_average: step}}}",
            "heir.yaml: scales.tiny: train.loss_average: a scale does not change this; allowed: train.precision, ",
        ),
        (
            "extends: base.yaml\nscales: {tiny: {stages: {sparse: {train: [router]}}}}",
            "heir.yaml: scales.tiny: stages.sparse.train: a scale does not change this; allowed: stages.sparse.steps, ",
        ),
    ],
)
def test_an_error_names_the_file_where_the_key_stands(tmp_path: Path, heir: str, expected: str) -> None:
    message = error_of(write(tmp_path, base=BASE, heir=heir))
    assert message.startswith((f"{tmp_path}/", str(RECIPES)))
    assert expected.format(folder=tmp_path) in message


def test_a_circle_and_a_missing_base_name_the_chain(tmp_path: Path) -> None:
    path = write(tmp_path, b="extends: c.yaml", c="extends: a.yaml", a="extends: b.yaml")
    a, b, c = (str(tmp_path / f"{name}.yaml") for name in "abc")
    assert error_of(path) == f"{c}: extends: a circle: {a} -> {b} -> {c} -> {a}"
    path = write(tmp_path, c="extends: nothing", b="extends: c.yaml", a="extends: b.yaml")
    assert error_of(path).startswith(f"{c}: extends ({a} -> {b} -> {c}): 'nothing': no such recipe")


def test_a_recipe_of_one_size_has_no_scale(tmp_path: Path) -> None:
    message = error_of("quickstart", "scale=tiny")
    assert message.startswith("override 'scale=tiny': ")
    assert "quickstart.yaml has no key `scale`" in message
    assert "override 'scale=': null; allowed: full, tiny" in error_of(write(tmp_path, base=BASE), "scale=")


def test_an_override_lies_over_the_scale_and_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE + "scales: {small: {data: {max_length: 16}}}")
    assert load_recipe(path, ["data.max_length=32", "scale=small"]).data.max_length == 32
    assert error_of(path, "data.max_length=x", "scale=small").startswith(
        "override 'data.max_length=x': data.max_length"
    )
    assert error_of(path, "data={mixtur: []}").startswith("override 'data={mixtur: []}': data.mixtur: unknown key")
