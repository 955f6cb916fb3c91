"""Reading a run's folder: resumed logs, unfinished lines, broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lvlm.analysis.run_folder import RunFolder, Score
from moe_lvlm.analysis.statistics import RoutingStatistics

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


def _routing(run: Path) -> RoutingStatistics:
    routing = RunFolder(run).routing
    assert routing is not None
    return routing
