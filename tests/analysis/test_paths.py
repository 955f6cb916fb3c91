"""Expert paths by task, against counts worked out by hand, scikit-learn and shuffles done the long way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

from moe_lvlm.analysis.paths import PathStatistics, mutual_information, path_label
from moe_lvlm.routing.trace import RoutingTrace
from tests.analysis.traces import connector_trace

# Six images of three tasks through three layers of three experts.
TASKS = ("vqa", "caption", "vqa", "vqa", "ocr", "caption")
PATHS = ((1, 0, 2), (0, 0, 0), (1, 0, 2), (2, 1, 0), (1, 0, 2), (0, 0, 0))


def counted() -> PathStatistics:
    statistics = PathStatistics()
    statistics.update(connector_trace(PATHS[:4]), TASKS[:4])
    statistics.update(connector_trace(PATHS[4:]), TASKS[4:])
    return statistics


def test_images_are_counted_by_task_and_path() -> None:
    statistics = counted()
    assert statistics.layers == (2, 3, 5)
    assert statistics.num_experts == 3
    assert statistics.tasks == ("vqa", "caption", "ocr")
    assert statistics.counts("vqa") == {(1, 0, 2): 2, (2, 1, 0): 1}
    assert statistics.counts("caption") == {(0, 0, 0): 2}
    assert statistics.counts("ocr") == {(1, 0, 2): 1}
    assert statistics.overall() == {(1, 0, 2): 3, (0, 0, 0): 2, (2, 1, 0): 1}
    assert len(statistics) == 6


def test_a_row_that_is_no_image_counts_nowhere() -> None:
    statistics = PathStatistics()
    statistics.update(connector_trace([(1, 1, 1)], keep=[False]), [])
    statistics.update(connector_trace([(1, 1, 1), (0, 1, 2), (2, 2, 2)], keep=[True, False, True]), ["a", "b"])
    assert statistics.overall() == {(1, 1, 1): 1, (2, 2, 2): 1}
    assert statistics.counts("b") == {(2, 2, 2): 1}


def test_tokens_of_the_language_model_are_no_path(hand_trace: RoutingTrace) -> None:
    statistics = PathStatistics()
    statistics.update(hand_trace, ["a", "b"])
    assert len(statistics) == 0
    assert statistics.layers == ()


def test_paths_are_ranked_by_their_mean_share_of_a_task() -> None:
    # by images 1-0-2 has 3 of 6; by share it has (2/3 + 0 + 1)/3, 0-0-0 has 1/3, 2-1-0 has 1/9
    assert counted().top_paths(2) == [(1, 0, 2), (0, 0, 0)]
    large = PathStatistics()
    large.update(connector_trace([(0, 0, 0)] * 6 + [(1, 1, 1)] * 4), ["large"] * 10)
    large.update(connector_trace([(2, 2, 2)] * 2), ["small"] * 2)
    # one of the small task's own comes before both of the large one's, though fewer images take it
    assert large.top_paths(9) == [(2, 2, 2), (0, 0, 0), (1, 1, 1)]


def test_ties_are_broken_by_the_lowest_experts() -> None:
    statistics = PathStatistics()
    statistics.update(connector_trace([(2, 0, 0), (0, 2, 0), (0, 0, 2)]), ["a"] * 3)
    assert statistics.top_paths(2) == [(0, 0, 2), (0, 2, 0)]


def test_shares_of_a_task_add_up_with_the_others() -> None:
    shares = counted().shares([(1, 0, 2), (0, 0, 0)])
    expected: list[list[float]] = [[2 / 3, 0, 1], [0, 1, 0], [1 / 3, 0, 0]]  # vqa, caption, ocr; the last row is 2-1-0
    assert shares.tolist() == [pytest.approx(row) for row in expected]


def test_expert_load_by_layer() -> None:
    assert counted().expert_load("vqa").tolist() == [[0, 2, 1], [2, 1, 0], [1, 0, 2]]
    assert counted().expert_load("caption").tolist() == [[2, 0, 0], [2, 0, 0], [2, 0, 0]]


def test_mutual_information_is_scikit_learn_s() -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        table = random.integers(0, 6, (4, 7))
        assert mutual_information(table) == pytest.approx(mutual_info_score(None, None, contingency=table), abs=1e-12)


def test_mutual_information_by_hand() -> None:
    assert mutual_information(np.array([[5, 0], [0, 5]])) == pytest.approx(math.log(2))
    assert mutual_information(np.array([[4, 2], [2, 1]])) == pytest.approx(0, abs=1e-12)


def test_chance_is_that_of_shuffled_tasks() -> None:
    random = np.random.default_rng(3)
    tasks = random.choice(["a", "b", "c"], 60, p=[0.6, 0.3, 0.1]).tolist()
    paths = random.choice(3, (60, 3), p=[0.7, 0.2, 0.1]).tolist()
    statistics = PathStatistics()
    statistics.update(connector_trace(paths), tasks)
    found = statistics.task_information(num_shuffles=2000)
    labels = [path_label(tuple(path)) for path in paths]
    table = np.array([[statistics.counts(task)[path] for path in statistics.overall()] for task in statistics.tasks])
    assert found.measured == pytest.approx(mutual_info_score(tasks, labels))
    # the exact mean over all shuffles
    assert found.by_chance == pytest.approx(expected_mutual_information(table, 60), rel=0.01)
    sizes = np.unique(tasks, return_counts=True)[1] / 60
    assert found.highest == pytest.approx(-(sizes * np.log(sizes)).sum())
    # the long way: images are shuffled one by one
    long = [mutual_info_score(random.permutation(tasks), labels) for _ in range(2000)]
    share = np.mean(np.array(long) >= found.measured - 1e-9)
    assert found.num_shuffles == 2000
    assert found.num_reached / 2000 == pytest.approx(share, abs=0.05)
    assert found.p_value == (found.num_reached + 1) / 2001
    assert 0.02 < found.p_value < 0.98  # else the line above says little
    assert statistics.task_information(num_shuffles=2000) == found
    assert statistics.task_information(num_shuffles=2000, seed=1) != found


def test_paths_that_follow_the_task_are_above_chance() -> None:
    statistics = PathStatistics()
    statistics.update(connector_trace([(0, 0, 0)] * 20 + [(1, 2, 1)] * 20), ["a"] * 20 + ["b"] * 20)
    found = statistics.task_information()
    assert found.measured == pytest.approx(math.log(2)) == found.highest
    assert found.by_chance < 0.05
    assert (found.num_reached, found.p_value) == (0, 1 / 1001)


def test_one_task_or_one_path_says_nothing() -> None:
    one_task, one_path = PathStatistics(), PathStatistics()
    one_task.update(connector_trace(PATHS), ["a"] * 6)
    one_path.update(connector_trace([PATHS[0]] * 6), TASKS)
    for statistics in (one_task, one_path, PathStatistics()):
        found = statistics.task_information(num_shuffles=20)
        assert found.measured == pytest.approx(0, abs=1e-12)
        assert found.by_chance == pytest.approx(0, abs=1e-12)
        assert found.p_value == 1


def test_parts_of_an_evaluation_add_up() -> None:
    whole, part, rest = counted(), PathStatistics(), PathStatistics()
    part.update(connector_trace(PATHS[:1]), TASKS[:1])
    rest.update(connector_trace(PATHS[1:]), TASKS[1:])
    empty = PathStatistics()
    empty.merge(part)
    empty.merge(PathStatistics())
    empty.merge(rest)
    assert_equal(empty, whole)
    assert part.counts("vqa") == {(1, 0, 2): 1}  # what was added is left alone


def test_round_trip(tmp_path: Path) -> None:
    counted().save(tmp_path / "paths.json")
    assert json.loads((tmp_path / "paths.json").read_text()) == {
        "format": 1,
        "layers": [2, 3, 5],
        "num_experts": 3,
        "counts": {"vqa": {"1-0-2": 2, "2-1-0": 1}, "caption": {"0-0-0": 2}, "ocr": {"1-0-2": 1}},
    }
    assert_equal(PathStatistics.load(tmp_path / "paths.json"), counted())
    PathStatistics().save(tmp_path / "empty.json")
    assert len(PathStatistics.load(tmp_path / "empty.json")) == 0


def test_experts_of_two_figures_are_kept_apart(tmp_path: Path) -> None:
    statistics = PathStatistics()
    statistics.update(connector_trace([(1, 11, 0), (11, 1, 0)], num_experts=12), ["a", "a"])
    statistics.save(tmp_path / "paths.json")
    assert PathStatistics.load(tmp_path / "paths.json").counts("a") == {(1, 11, 0): 1, (11, 1, 0): 1}


GOOD = {"format": 1, "layers": [2, 3], "num_experts": 3, "counts": {"a": {"1-0": 2}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2; allowed: 1"),
        ({"more": 1}, "keys format, layers, num_experts, counts, more; allowed: exactly"),
        ({"layers": [3, 2]}, r"layers: \[3, 2\]; allowed: each once, ascending"),
        ({"layers": "23"}, "layers: '23'; allowed: whole numbers"),
        ({"layers": []}, "empty; allowed: only if all is"),
        ({"num_experts": 0}, "empty; allowed: only if all is"),
        ({"num_experts": True}, r"num_experts: \[True\]; allowed: whole numbers from 0"),
        ({"counts": [1]}, r"counts: \[1\]; allowed: an object"),
        ({"counts": {"a": {}}}, "task 'a': {}; allowed: an object, at least one path"),
        ({"counts": {"a": {"1-0": 0}}}, r"task 'a': \[0\]; allowed: whole numbers from 1"),
        ({"counts": {"a": {"1-0": 1.5}}}, "allowed: whole numbers from 1"),
        ({"counts": {"a": {"1": 1}}}, "path '1'; allowed: an expert from 0 to 2 for each of 2 layers"),
        ({"counts": {"a": {"1-3": 1}}}, "path '1-3'; allowed"),
        ({"counts": {"a": {"1-0-x": 1}}}, "path '1-0-x'; allowed"),
        ({"counts": {"a": {"01-0": 1}}}, "path '01-0'; allowed"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "paths.json").write_text(json.dumps(GOOD))
    assert PathStatistics.load(tmp_path / "paths.json").counts("a") == {(1, 0): 2}
    (tmp_path / "paths.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(ValueError, match=message) as error:
        PathStatistics.load(tmp_path / "paths.json")
    assert str(tmp_path / "paths.json") in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_file_that_is_none_of_ours_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "paths.json").write_text(text)
    with pytest.raises(ValueError, match=r"paths\.json: (not JSON|expert paths of format None)"):
        PathStatistics.load(tmp_path / "paths.json")


def test_what_does_not_fit_is_refused() -> None:
    statistics = counted()
    with pytest.raises(ValueError, match="tasks: 2 names; allowed: 1, one an image"):
        statistics.update(connector_trace([(0, 0, 0)]), ["a", "b"])
    with pytest.raises(ValueError, match=r"layers \[2, 3\] of 3 experts; allowed: layers \[2, 3, 5\] of 3 experts"):
        statistics.update(connector_trace([(0, 0)], layers=(2, 3)), ["a"])
    other = PathStatistics()
    other.update(connector_trace([(0, 0, 0)], num_experts=4), ["a"])
    with pytest.raises(ValueError, match="of 4 experts; allowed"):
        statistics.merge(other)
    assert_equal(statistics, counted())


def test_layers_that_do_not_fit_together_are_refused() -> None:
    def with_top(change: dict[str, Any]) -> RoutingTrace:
        found = connector_trace([(0, 0, 0), (1, 1, 1)])
        trace = RoutingTrace(found.context)
        for site, decision in found.items():
            trace.record(site, decision._replace(**change) if site.layer == 5 else decision)
        return trace

    for change, message in (
        ({"keep_RK": torch.tensor([[True], [False]])}, "layer=5.*other images than .*layer=2"),
        ({"expert_ids_RK": torch.zeros(2, 2).long()}, "layer=5.*2 experts an image; allowed: 1"),
        ({"probs_RE": torch.full((2, 4), 0.25)}, "layers of 3 and 4 experts; allowed: one number for all"),
    ):
        with pytest.raises(ValueError, match=message):
            PathStatistics().update(with_top(change), ["a", "b"])


def assert_equal(left: PathStatistics, right: PathStatistics) -> None:
    assert (left.layers, left.num_experts) == (right.layers, right.num_experts)
    assert left.tasks == right.tasks
    assert [left.counts(task) for task in left.tasks] == [right.counts(task) for task in right.tasks]
