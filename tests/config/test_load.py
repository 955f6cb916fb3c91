"""Recipes from YAML: overrides, errors that help, and the way back to YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_lvlm.config.load import RecipeError, dump_recipe, list_recipes, load_recipe
from moe_lvlm.config.yaml_text import dump_yaml, parse_yaml

MINIMAL = """
name: small
model:
  vision_tower: {from_pretrained: tower}
  language_model: {from_pretrained: llm}
data: {mixture: [{path: train.json}]}
stages:
  - {name: tune, train: [connector], steps: 3, learning_rate: 1e-3}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_quickstart_is_the_recipe_that_was_measured() -> None:
    recipe = load_recipe("quickstart")
    assert [(stage.name, stage.steps, stage.learning_rate) for stage in recipe.stages] == [
        ("align", 60, 2e-3),
        ("tune", 320, 2e-3),
        ("sparse", 160, 1e-3),
    ]
    assert {(stage.micro_batch, stage.global_batch) for stage in recipe.stages} == {(32, 64)}
    assert [stage.upcycle for stage in recipe.stages] == [False, False, True]
    assert recipe.train.optimizer.betas == (0.9, 0.98)
    assert recipe.moe.router.kind == "ltdr"
    assert recipe.moe.balance.on == ("language",)
    assert recipe.parallel.expert_parallel_size == 2


def test_every_shipped_recipe_loads_and_survives_the_way_to_yaml_and_back(tmp_path: Path) -> None:
    assert "quickstart" in list_recipes()
    for name in list_recipes():
        recipe = load_recipe(name)
        assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_a_resolved_recipe_reads_the_same_in_plain_yaml() -> None:
    recipe = load_recipe("quickstart")
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(mode="json")


def test_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL),
        [
            "train.precision=fp32",  # a group that the file does not have
            "stages.0.steps=20",  # an index of a list
            "stages.0.learning_rate=5e-4",
            "moe.layers=[0, 3]",
            "moe.router={kind: ltdr, tail_k: 3}",
            "output_dir=a=b",  # only the first = parts
            "seed=1",
            "seed=2",  # the last one counts
        ],
    )
    assert recipe.train.precision == "fp32"
    assert (recipe.stages[0].steps, recipe.stages[0].learning_rate) == (20, 0.0005)
    assert recipe.moe.layers == (0, 3)
    assert recipe.moe.router.model_dump()["tail_k"] == 3
    assert recipe.output_dir == "a=b"
    assert recipe.seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.precision=fp32", ["trian", "did you mean 'train'?"]),
        ("train.precison=fp32", ["train.precison", "did you mean 'precision'?"]),
        ("stages.0.learnin_rate=1", ["stages.0.learnin_rate", "did you mean 'learning_rate'?"]),
        ("moe.router={kind: ltdr, tail: 4}", ["moe.router.tail:", "did you mean 'tail_k'?", "eea_select"]),
        ("data.mixture.0.pat=x", ["data.mixture.0.pat", "did you mean 'path'?", "weight"]),
        ("train.precision=fp16", ["train.precision", "'fp16'", "'fp32' or 'bf16'"]),
        ("train.gradient_checkpointing=yes", ["train.gradient_checkpointing", "'yes'", "boolean", "integer"]),
        ("train.gradient_checkpointing=0", ["train.gradient_checkpointing", "0", "greater than or equal to 1"]),
        ("stages.0.steps=true", ["stages.0.steps", "True", "integer"]),
        ("stages.0.steps='20'", ["stages.0.steps", "'20'", "integer"]),
        ("stages.0.steps=2.5", ["stages.0.steps", "2.5"]),
        ("seed=-1", ["seed", "-1", "greater than or equal to 0"]),
        ("moe.top_k=5", ["moe.top_k", "5", "num_experts (4)"]),
        ("moe.router.kind=dense", ["moe.router.kind", "'dense'", "'top_k', 'ltdr'"]),
        ("moe.layers=spars", ["moe.layers", "'spars'", "'sparse'", "list"]),
        ("parallel.expert_parallel_size=3", ["parallel.expert_parallel_size", "3", "num_experts (4)"]),
        ("stages.1.steps=5", ["stages", "0 to 0"]),
        ("stages.first.steps=5", ["stages", "index, 0 to 0"]),
        ("seed.x=1", ["seed", "'x'"]),
        ("seed", ["key=value"]),
        ("=3", ["key=value"]),
        ("stages..steps=3", ["key=value"]),
        ("seed=[1", ["not YAML"]),
        ("model=", ["model", "null", "mapping"]),
    ],
)
def test_a_wrong_override_says_where_and_what_is_allowed(tmp_path: Path, override: str, expected: list[str]) -> None:
    text = MINIMAL.replace("stages:", "seed: 0\nmoe: {num_experts: 4, top_k: 2, router: {kind: top_k}}\nstages:")
    message = error_of(write(tmp_path, text), override)
    assert message.startswith(f"override {override!r}:")
    for piece in expected:
        assert piece in message


def test_every_problem_of_a_file_has_its_line(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: small", "name: small\nseeed: 1").replace("steps: 3", "steps: 3, epochs: 1")
    text = text.replace("{from_pretrained: llm}", "{from_pretrained: llm, from_config: {model_type: llama}}")
    lines = error_of(write(tmp_path, text)).splitlines()
    assert all(line.startswith(str(tmp_path / "recipe.yaml")) for line in lines)
    assert sorted(line.split(": ")[1] for line in lines) == ["model.language_model", "seeed", "stages.0"]


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, MINIMAL.replace(", learning_rate: 1e-3", "")))
    assert message == f"{tmp_path / 'recipe.yaml'}: stages.0.learning_rate: this key is missing"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "mapping"),
        ("- a\n- b\n", "mapping"),
        ("name: a\nname: b\n", "'name' stands twice, in lines 1 and 2"),
        ("name: a\nmoe:\n  top_k: 1\n  top_k: 2\n", "'top_k' stands twice, in lines 3 and 4"),
        ("name: [a\n", "line 2"),
        ("1: a\n", "the key 1 is not a string"),
        ("name: !!python/object/apply:os.system [exit]\n", "line 1"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, expected: str) -> None:
    message = error_of(write(tmp_path, text))
    assert message.startswith(str(tmp_path / "recipe.yaml"))
    assert expected in message


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    assert str(path) in error_of(path)


def test_unknown_recipes() -> None:
    assert "did you mean 'quickstart'?" in error_of("quickstrt")
    assert "no such file" in error_of("nowhere/recipe.yaml")
    assert "unknown recipe" in error_of("../recipes/quickstart")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5e3", 5000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("-7", -7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    """Values from the core schema of the YAML 1.2 specification, section 10.3.2."""
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_on_is_a_key() -> None:
    assert parse_yaml("on: [language]") == {"on": ["language"]}


def test_merge_keys_may_repeat_a_key() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@settings(deadline=None)  # a busy machine is no failure
@example("\x85")
@example({"a\u2028": "b\u2029c"})
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_plain_value_survives_the_way_to_yaml_and_back(value: object) -> None:
    assert parse_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize("text", ["on", "1e-3", "0o7", "010", "yes", "1:30", "null", "~", "", ".5", "2024-01-01", "<<"])
def test_strings_that_look_like_something_else_are_quoted_for_every_reader(text: str) -> None:
    dumped = dump_yaml({"key": text, text: 1})
    assert parse_yaml(dumped) == yaml.safe_load(dumped) == {"key": text, text: 1}
