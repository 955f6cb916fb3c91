"""Evaluation of runs with LoRA experts from end to end: what is written, and what goes with another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_lvlm.analysis.report import write_report
from moe_lvlm.analysis.run_folder import RunFolder
from moe_lvlm.evaluation.runner import evaluate
from tests.adapted_run import mocle_fields, write_adapted_run


def write_run(folder: Path, adapter: dict[str, Any]) -> Path:
    run = write_adapted_run(folder, adapter)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["evaluation"] = {
        "tasks": [{"name": "colors", "path": "train.json", "max_new_tokens": 2}], "batch_size": 2
    }  # fmt: skip
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "log.jsonl").write_text("")
    return run


def test_lora_experts_of_a_run_are_written_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, mocle_fields(gating="sentence"))
    evaluate(run, device="cpu")
    folder = RunFolder(run)
    assert folder.adapters is not None
    assert folder.training_adapters is not None
    assert folder.instructions is not None
    # the records are those of training: four of them
    assert [(name, one.samples) for name, one in folder.adapters.subsets.items()] == [("colors", 4)]
    assert [(name, one.samples) for name, one in folder.training_adapters.subsets.items()] == [("train", 4)]
    assert folder.adapters.gating == "sentence"
    assert len(folder.instructions.datasets["train"]) == 4
    assert folder.routing is None
    assert folder.examples == []
    # that of the one task is that of the one dataset: the same four prompts, in another order
    one, other = folder.adapters.subsets["colors"], folder.training_adapters.subsets["train"]
    assert one.experts_LE.tolist() == other.experts_LE.tolist()
    assert one.gate_L.tolist() == pytest.approx(other.gate_L.tolist(), abs=1e-5)
    assert "left out" not in capsys.readouterr().out
    assert "adapter-experts.png" in write_report(run).read_text()


def test_training_data_that_are_gone_are_named_and_scores_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, mocle_fields(gating="sentence"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["mixture"] = [{"path": "gone.json"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert set(evaluate(run, device="cpu")) == {"colors"}
    assert "training data: gone left out of the LoRA experts' statistics" in capsys.readouterr().out
    assert "Dataset gone of the training data is left out" in write_report(run).read_text()


def test_a_single_lora_has_nothing_of_the_kind_and_files_of_another_model_go(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"kind": "lora", "rank": 2, "target_modules": ["q_proj"]})
    for folder, names in (("colors", ("adapters.json",)), ("_training_data", ("adapters.json", "instructions.json"))):
        (run / "eval" / folder).mkdir(parents=True)
        for name in names:
            (run / "eval" / folder / name).write_text(json.dumps("old"))
    evaluate(run, device="cpu")
    assert list(run.glob("eval/*/adapters.json")) == list(run.glob("eval/*/instructions.json")) == []
