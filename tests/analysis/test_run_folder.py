"""Reading a run's folder: resumed logs, unfinished lines, broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moe_lvlm.analysis.adapters import AdapterStatistics
from moe_lvlm.analysis.instructions import Instruction, InstructionSample
from moe_lvlm.analysis.paths import PathStatistics
from moe_lvlm.analysis.run_folder import RunFolder, Score
from moe_lvlm.analysis.statistics import RoutingStatistics
from tests.analysis.traces import adapter_trace, connector_trace

RunMaker = Callable[..., Path]


@pytest.fixture
def run(run_maker: RunMaker, tmp_path: Path) -> Path:
    return run_maker(tmp_path / "run", evaluated=False)


def test_steps_repeated_after_a_resume_count_once(run: Path) -> None:
    steps = [{"event": "step", "stage": "a", "global_step": number, "loss": number} for number in (1, 2, 3)]
    again = [step | {"loss": -1} for step in steps[1:]]
    stage = {"event": "stage", "stage": "a"}
    events = [stage, *steps, {"event": "resume"}, stage, *again]
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    folder = RunFolder(run)
    assert [(step["global_step"], step["loss"]) for step in folder.steps] == [(1, 1), (2, -1), (3, -1)]
    assert folder.stages == [stage]


def test_line_being_written_is_left_out(run: Path) -> None:
    (run / "log.jsonl").write_text('{"event": "resume"}\n{"event": "st')
    assert RunFolder(run).log == [{"event": "resume"}]


@pytest.mark.parametrize("line", ['{"event":', "[1]"])
def test_broken_line_is_named(run: Path, line: str) -> None:
    (run / "log.jsonl").write_text('{"event": "resume"}\n' + line + '\n{"event": "resume"}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2"):
        _ = RunFolder(run).log


def test_scores_come_from_metrics(run: Path) -> None:
    assert RunFolder(run).scores == []
    (run / "metrics.json").write_text('{"other": 1, "eval": {"what": {"accuracy": 1, "majority": 0.5, "n": 4}}}')
    assert RunFolder(run).scores == [Score("what", 1.0, 0.5, 4)]
    (run / "metrics.json").write_text('{"eval": {"what": {"accuracy": 1, "n": 4}}}')
    with pytest.raises(ValueError, match="without 'majority'"):
        _ = RunFolder(run).scores


def test_prediction_that_lacks_a_key_is_named(run: Path) -> None:
    folder = run / "eval" / "scenes"
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text('{"key": "a", "task": "b", "image": null, "question": "c"}\n')
    with pytest.raises(ValueError, match=r"record 1: prediction, answer, correct missing"):
        _ = RunFolder(run).predictions


def test_evaluation_sets_are_put_together(run_maker: RunMaker, tmp_path: Path) -> None:
    run = run_maker(tmp_path / "other")
    (site, alone), *_ = _routing(run).items()
    first, second = run / "eval" / "scenes", run / "eval" / "again"
    second.mkdir()
    for file in first.iterdir():
        (second / file.name).write_bytes(file.read_bytes())
    folder = RunFolder(run)
    assert _routing(run)[site].load.tolist() == (2 * alone.load).tolist()
    assert len(folder.predictions) == 80
    assert len(folder.examples) == 12  # each image once


def test_expert_paths_of_all_sets_are_put_together(run: Path) -> None:
    assert RunFolder(run).paths is None
    for name, task, path in (("one", "vqa", (1, 0)), ("two", "caption", (2, 2)), ("three", "vqa", (1, 0))):
        (run / "eval" / name).mkdir(parents=True)
        statistics = PathStatistics()
        statistics.update(connector_trace([path], layers=(4, 5)), [task])
        statistics.save(run / "eval" / name / "paths.json")
    paths = RunFolder(run).paths
    assert paths is not None
    assert (paths.counts("vqa"), paths.counts("caption")) == ({(1, 0): 2}, {(2, 2): 1})


def test_a_connector_that_saw_no_image_has_no_paths(run: Path) -> None:
    (run / "eval" / "text").mkdir(parents=True)
    PathStatistics().save(run / "eval" / "text" / "paths.json")
    assert RunFolder(run).paths is None


def test_lora_experts_of_all_sets_are_put_together_and_apart_from_the_training_data(run: Path) -> None:
    folder = RunFolder(run)
    assert (folder.adapters, folder.training_adapters, folder.instructions) == (None, None, None)
    for name, task, choice in (("one", "vqa", 0), ("two", "cap", 2), ("_training_data", "vqa", 1), ("three", "vqa", 1)):
        (run / "eval" / name).mkdir(parents=True)
        statistics = AdapterStatistics("cluster", True)
        statistics.update(adapter_trace([((choice, 0.5), (choice, 0.5))], clusters=[3]), [task])
        statistics.save(run / "eval" / name / "adapters.json")
    sample = InstructionSample(4, {"vqa": [Instruction("what ?", 3)]})
    sample.save(run / "eval" / "_training_data" / "instructions.json")
    folder = RunFolder(run)
    assert folder.adapters is not None
    assert {name: one.experts_LE.tolist() for name, one in folder.adapters.subsets.items()} == {
        "vqa": [[1, 1, 0]] * 2,
        "cap": [[0, 0, 1]] * 2,
    }
    assert folder.training_adapters is not None
    assert folder.training_adapters.subsets["vqa"].experts_LE.tolist() == [[0, 1, 0]] * 2
    assert folder.instructions == sample


def test_score_knows_the_metric_of_its_set(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["evaluation"] = {"tasks": [{"name": "coco", "metric": "cider"}, {"name": "gqa", "metric": "vqa"}]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, task in (("coco", "caption"), ("gqa", "gqa"), ("gone", "old")):
        (run / "eval" / name).mkdir(parents=True)
        record = {
            "key": "k",
            "task": task,
            "image": None,
            "question": "",
            "prediction": "",
            "answer": "",
            "correct": True,
        }
        (run / "eval" / name / "predictions.jsonl").write_text(json.dumps(record) + "\n")
    numbers = {"accuracy": 0.4, "majority": 0.1, "n": 4}
    scores = dict.fromkeys(("caption", "gqa", "old", "unseen"), numbers)
    (run / "metrics.json").write_text(json.dumps({"eval": scores | {"high": numbers | {"accuracy": 1.2}}}))
    caption, gqa, old, unseen, high = RunFolder(run).scores
    assert [score.metric for score in (caption, gqa, old, unseen)] == ["cider", "vqa", None, None]
    # a poor CIDEr is no share either
    assert [score.unit for score in (caption, gqa, old, unseen)] == ["CIDEr", "%", "%", "%"]
    assert (high.is_share, high.unit) == (False, "CIDEr")


def _routing(run: Path) -> RoutingStatistics:
    routing = RunFolder(run).routing
    assert routing is not None
    return routing
