"""`moe_lvlm.train` in one process without a launcher, from every kind of beginning; and `train` on a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moe_lvlm
from moe_lvlm.checkpoint.source import open_source
from moe_lvlm.config.recipe import ModelSettings
from moe_lvlm.models.build import build_dense
from moe_lvlm.training.dry_run import describe
from tests.tiny_run import tiny_recipe, write_run_inputs
from tests.training.conftest import OVERRIDES
from tests.training.launching import Server, events

pytestmark = pytest.mark.distributed

RATE = 1e-3


def one_stage(name: str = "only", **settings: Any) -> list[dict[str, Any]]:
    stage = {"name": name, "train": ["moe"], "steps": 2, "micro_batch": 2, "global_batch": 8, "learning_rate": RATE}
    return [stage | settings]


def write(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def first_step(run: Path) -> dict[str, Any]:
    return events(run).named("step")[0]


def test_beginnings(server: Server, unbroken: Path, tmp_path: Path) -> None:
    """Upcycling in the first stage from parts and from a whole model; on from a finished sparse run; in one process."""
    write_run_inputs(tmp_path)
    plain = tiny_recipe(tmp_path)

    def recipe(name: str, **changes: Any) -> str:
        return write(tmp_path / f"{name}.yaml", plain | {"output_dir": str(tmp_path / name)} | changes)

    dense, processor = build_dense(ModelSettings.model_validate(plain["model"]), seed=0, dtype=torch.float32)
    dense.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    whole, finished = {"from_pretrained": str(tmp_path / "whole")}, {"from_pretrained": str(unbroken)}
    sparse = one_stage(upcycle=True)
    job = server.run(
        [
            "train_several",
            recipe("parts", stages=sparse),
            recipe("whole-run", stages=sparse, model=whole),
            recipe("finished", stages=one_stage(), model=finished),
            # the first stage's name begins with the second's
            recipe("names", stages=[*one_stage("only-dense", train=["connector"]), *sparse], model=whole),
        ],
        world=0,
    )
    runs = [tmp_path / name for name in ("parts", "whole-run", "finished", "names")]
    assert [line for line in job.output.splitlines() if line in map(str, runs)] == [str(run) for run in runs]
    for run in runs:
        assert (run / "DONE").exists()
        assert events(run).named("stage")[-1]["trainable"] == 2 * (4 * 32 + 4 * 3 * 32 * 48)

    # every expert is a copy of the dense FFN, so that the routers do not matter before the first step
    assert first_step(runs[1])["language_loss"] == pytest.approx(first_step(runs[0])["language_loss"], abs=1e-5)
    trained = open_source(runs[1] / "checkpoints" / "only-000002")
    for name, value in dense.named_parameters():
        if name in trained.names():
            assert torch.equal(trained.read(name), value), name
    before, after = (
        open_source(unbroken / "checkpoints" / "sparse-000005"),
        open_source(runs[2] / "checkpoints" / "only-000002"),
    )
    assert set(before.names()) == set(after.names())
    for name in after.names():
        difference = (after.read(name) - before.read(name)).abs().max()
        if ".mlp.experts." in name or ".mlp.router." in name:
            assert 0 < difference < 3 * RATE, name  # AdamW moves a weight by about the learning rate in a step
        else:
            assert difference == 0, name


def test_upcycling_what_is_sparse_is_refused(server: Server, unbroken: Path, tmp_path: Path) -> None:
    write_run_inputs(tmp_path)
    path = tmp_path / "again.yaml"
    write(path, tiny_recipe(tmp_path, stages=one_stage(upcycle=True), model={"from_pretrained": str(unbroken)}))
    job = server.start(["train", str(path)], world=1)
    assert job.wait() == [2], job.output
    assert "stage only: upcycle: true, but the model it starts from is sparse already" in job.output


def test_upcycling_what_is_sparse_is_refused_by_the_dry_run(unbroken: Path, tmp_path: Path) -> None:
    write_run_inputs(tmp_path)
    path = tmp_path / "again.yaml"
    write(path, tiny_recipe(tmp_path, stages=one_stage(upcycle=True), model={"from_pretrained": str(unbroken)}))
    with pytest.raises(ValueError, match="sparse already"):
        describe(moe_lvlm.load_recipe(path))


def test_a_mistake_in_a_later_stage_is_found_first(server: Server, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = server.start(["train", str(recipe), "stages.1.train=[conector]", f"output_dir={run}"], world=1)
    assert job.wait() == [2], job.output
    assert "unknown part 'conector'" in job.output
    assert events(run).named("step") == []


def test_a_finished_run(server: Server, recipe: Path, unbroken: Path, tmp_path: Path) -> None:
    """The same command changes nothing; another recipe is refused on all processes, by one message."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    command = ["train", str(recipe), *OVERRIDES, f"output_dir={run}"]
    server.run(command)
    assert events(run).losses() == events(unbroken).losses()
    assert len(events(run).named("done")) == 1
    assert json.loads((run / "deepspeed.json").read_text()).keys() == {"tune", "sparse"}

    job = server.start([*command, "seed=5"])
    assert job.wait() == [2, 2], job.output
    assert job.output.count("seed: 0 before, 5 now") == 1


def test_what_a_run_holds(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir() if not path.name.startswith(".")}
    assert names == {
        "DONE", "DONE.sparse", "DONE.tune", "checkpoints", "deepspeed.json", "environment.txt", "log.jsonl", "processor",
        "recipe.yaml", "tensorboard",
    }  # fmt: skip
    log = events(unbroken)
    assert [line["event"] for line in log.lines if line["event"] in ("stage", "done")] == ["stage", "stage", "done"]
    assert [line["global_step"] for line in log.named("step")] == list(range(1, 9))
    assert len(log.named("checkpoint")) == 8
    for line in log.named("checkpoint"):
        assert sum(path.stat().st_size for path in Path(line["path"]).iterdir()) == line["bytes"]
    dense, sparse = log.named("stage")
    assert (dense["steps"], sparse["steps"]) == (3, 5)
    for line in log.named("step"):
        is_sparse = line["stage"] == "sparse"
        assert (line["balance_loss"] is not None) == is_sparse
        assert line["loss"] == pytest.approx(line["language_loss"] + (line["balance_loss"] or 0))
        assert line["epoch"] == pytest.approx(line["step"] * 8 / 40)
        if is_sparse:
            # two experts a language token; two a vision token, or all four in the tail
            language = {key: sum(loads["language"]) for key, loads in line["expert_load"].items()}
            vision = {key: sum(loads["vision"]) for key, loads in line["expert_load"].items()}
            assert set(language) == {"0", "2"}
            for key, share in line["tail_share"].items():
                num_vision = line["tokens"] - language[key] // 2
                assert num_vision % 4 == 0  # four visual tokens an image
                assert 2 * num_vision < vision[key] < 4 * num_vision
                assert vision[key] % 2 == 0
                assert 0 < share < 1
    assert log.losses()[-1] < log.losses()[0]


def test_counts_of_a_stage_are_of_the_whole_model(unbroken: Path) -> None:
    """Not of one process's share of the experts."""
    sparse = events(unbroken).named("stage")[1]
    assert sparse["trainable"] == 2 * (4 * 32 + 4 * 3 * 32 * 48)
