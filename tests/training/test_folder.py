"""A run's folder: only a run of the same recipe goes on in it, and only what is ours is removed."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.config.load import dump_recipe, load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.training.folder import (
    adopt_run,
    check_same_run,
    describe_environment,
    prepare_folder,
    run_folder,
    write_facts,
)
from tests.tiny_run import tiny_recipe


def make(folder: Path, **changes: Any) -> Recipe:
    """The tiny recipe; changes: keys with `__` for dots."""
    values = tiny_recipe(folder)
    for path, value in changes.items():
        *parents, last = path.split("__")
        at: Any = values
        for parent in parents:
            at = at[int(parent)] if isinstance(at, list) else at.setdefault(parent, {})
        at[last] = value
    return Recipe.model_validate(values)


def test_a_new_folder_gets_the_resolved_recipe(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    folder = prepare_folder(recipe, resume=True)
    assert folder == tmp_path / "run"
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert prepare_folder(recipe, resume=True) == folder


def test_the_default_folder_bears_the_name(tmp_path: Path) -> None:
    assert run_folder(make(tmp_path, output_dir=None)) == Path("runs/tiny")


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("seed", {"seed": 3}),
        ("moe.top_k", {"moe__top_k": 1}),
        ("moe.router.kind", {"moe__router": {"kind": "top_k"}}),
        ("stages.1.steps", {"stages__1__steps": 6}),
        ("stages.0.train.1", {"stages__0__train": ["connector"]}),
        ("stages.0.learning_rate", {"stages__0__learning_rate": 0.5}),
        ("stages.0.global_batch", {"stages__0__global_batch": 4}),
        ("train.precision", {"train__precision": "bf16"}),
        ("train.gradient_clipping", {"train__gradient_clipping": 2.0}),
        ("train.optimizer.weight_decay", {"train__optimizer": {"weight_decay": 0.1}}),
        ("train.schedule.kind", {"train__schedule": {"kind": "linear"}}),
        ("data.max_length", {"data__max_length": 32}),
        ("data.mixture.0.weight", {"data__mixture": [{"path": "train.json", "weight": 2.0}]}),
        ("model.image_token", {"model__image_token": "<picture>"}),
    ],
)
def test_what_changes_the_training_is_refused(key: str, changes: dict[str, Any], tmp_path: Path) -> None:
    prepare_folder(make(tmp_path), resume=True)
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match="holds a run of another recipe") as caught:
        prepare_folder(make(tmp_path, **changes), resume=True)
    assert f"{key}: " in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == written


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__expert_parallel_size": 2},
        {"parallel__deepspeed": "zero3"},
        {"train__log_every": 7},
        {"train__checkpoint__every": 9},
        {"train__max_skipped_steps": 1},
        {"train__hang_timeout": 60},
        {"train__gradient_checkpointing": True},
        {"data__num_workers": 2},
        {"data__bad_sample_limit": 0.5},
        {"evaluation": {"tasks": [{"name": "color", "path": "test.json"}]}},
    ],
)
def test_topology_and_logging_may_change(changes: dict[str, Any], tmp_path: Path) -> None:
    prepare_folder(make(tmp_path), resume=True)
    now = make(tmp_path, **changes)
    prepare_folder(now, resume=True)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == now


def test_both_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed: 0 before, 5 now"):
        check_same_run(make(tmp_path), make(tmp_path, seed=5), tmp_path)
    check_same_run(make(tmp_path), make(tmp_path, output_dir="elsewhere", name="other"), tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"run: not empty and not a run of ours"):
            prepare_folder(make(tmp_path), resume=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_fresh_removes_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    run = prepare_folder(make(tmp_path), resume=True)
    for name in ("checkpoints/tune-000001", "processor", "tensorboard", "eval/color", "report", "notes"):
        (run / name).mkdir(parents=True)
        (run / name / "file").touch()
    for name in ("DONE", "log.jsonl", "bad_samples.jsonl", "metrics.json", "deepspeed.json", "environment.txt"):
        (run / name).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (run / "report" / "file").unlink()
    (run / "report").rmdir()
    (run / "report").symlink_to(outside)
    changed = make(tmp_path, seed=8)
    prepare_folder(changed, resume=False)
    assert sorted(path.name for path in run.iterdir()) == ["notes", "recipe.yaml"]
    assert (run / "notes" / "file").exists()
    assert (outside / "kept").exists()
    assert (run / "recipe.yaml").read_text() == dump_recipe(changed)


def test_facts_of_the_start(tmp_path: Path) -> None:
    write_facts(tmp_path, deepspeed={"tune": {"steps_per_print": 1}}, world_size=3)
    assert (tmp_path / "deepspeed.json").read_text() == '{\n  "tune": {\n    "steps_per_print": 1\n  }\n}\n'
    text = (tmp_path / "environment.txt").read_text()
    assert text == describe_environment(3)
    lines = dict(line.split(": ", 1) for line in text.splitlines())
    assert lines["processes"] == "3"
    assert lines["deepspeed"].startswith("0.19.8")


@pytest.mark.parametrize("resume", [True, False])
def test_a_batch_job_may_have_been_there_before(resume: bool, tmp_path: Path) -> None:
    """Its script and logs lie in the run's folder before training begins, and are never removed."""
    run = tmp_path / "run"
    for name in ("slurm/job.sbatch", "logs/rank-000.log", "hangs/20261126T100000Z-rank-000.txt", ".lock"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    prepare_folder(make(tmp_path), resume=resume)
    for name in ("DONE", "DONE.tune", "DONE.sparse"):
        (run / name).touch()
    prepare_folder(make(tmp_path, seed=8), resume=False)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "logs", "recipe.yaml", "slurm"]
    assert (run / "slurm" / "job.sbatch").is_file()
    assert (run / "logs" / "rank-000.log").is_file()


@pytest.mark.parametrize("is_new", [True, False])
def test_the_recipe_is_never_half_written(is_new: bool, tmp_path: Path) -> None:
    """A process that may write no file of that size fails, and the next one goes on."""
    recipe = make(tmp_path)
    if not is_new:
        prepare_folder(recipe, resume=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare_folder(recipe, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = prepare_folder(recipe, resume=True)
    assert load_recipe(folder / "recipe.yaml") == recipe


def test_a_moved_checkpoint_becomes_a_run(tmp_path: Path) -> None:
    source = prepare_folder(make(tmp_path / "a"), resume=True)
    (source / "processor").mkdir()
    (source / "processor" / "tokenizer.json").write_text("{}")
    (source / "log.jsonl").write_text("")
    target = tmp_path / "b"
    target.mkdir()
    assert adopt_run(source, target) == ["processor", "recipe.yaml"]
    assert sorted(path.name for path in target.iterdir()) == ["processor", "recipe.yaml"]
    moved = make(tmp_path / "a", output_dir=str(target))
    assert prepare_folder(moved, resume=True) == target  # training goes on there
    assert adopt_run(source, target) == []  # a run already
    assert load_recipe(target / "recipe.yaml") == moved
    assert adopt_run(tmp_path / "none", tmp_path / "c") == []
