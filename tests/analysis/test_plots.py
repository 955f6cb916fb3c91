"""Figures: what is drawn, read back from the figure's artists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from moe_lvlm.analysis import plots
from moe_lvlm.analysis.adapters import AdapterStatistics, linear_name
from moe_lvlm.analysis.instructions import Instruction, InstructionMap, InstructionSample
from moe_lvlm.analysis.paths import PathStatistics
from moe_lvlm.analysis.plots.adapters import shown_linears
from moe_lvlm.analysis.plots.routing import merged_bins
from moe_lvlm.analysis.plots.style import smooth, spread
from moe_lvlm.analysis.run_folder import Score
from moe_lvlm.analysis.statistics import RoutingStatistics
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Site
from tests.analysis.traces import adapter_trace, connector_trace


def test_merged_bins_keep_counts_and_places() -> None:
    random = np.random.default_rng(0)
    edges = np.linspace(0, 0.1875, 2001)
    values = random.random((2, 500)) * 0.03
    fine = np.stack([np.histogram(row, bins=edges)[0] for row in values])
    counts, coarse = merged_bins(fine, edges)
    assert len(coarse) == counts.shape[1] + 1 <= 52
    assert coarse[-1] >= values.max()
    for row, expected in zip(counts, values, strict=True):
        assert row.tolist() == np.histogram(expected, bins=coarse)[0].tolist()


def test_smooth_is_a_centred_mean() -> None:
    result = smooth([1.0, 2.0, np.nan, 6.0, 10.0], 3)
    assert result.tolist() == [1.5, 1.5, 4.0, 8.0, 8.0]
    assert np.isnan(smooth([np.nan], 1)).all()


def test_spread_takes_ends_and_keeps_order() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]


def test_accuracy_bars_have_the_scores_lengths() -> None:
    figure = plots.accuracy_by_task([Score("what", 0.9, 0.1, 50), Score("where", 0.05, 0.3, 40)])
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [0.9, 0.05]
    assert [line.get_xdata()[0] for line in axis.lines] == [0.1, 0.3]


def test_a_score_that_is_no_share_widens_the_axis() -> None:
    caption = Score("caption", 1.392, 0.1, 50, metric="cider")
    figure = plots.accuracy_by_task([Score("what", 0.9, 0.1, 50), caption])
    (axis,) = figure.axes
    assert axis.get_xlim()[1] > 1.392
    assert [text.get_text() for text in axis.texts] == ["90.0%", "139.2 CIDEr"]
    assert axis.get_xlabel() == "accuracy in %, or 100 x CIDEr"
    (axis,) = plots.accuracy_by_task([Score("what", 0.9, 0.1, 50)]).axes
    assert (axis.get_xlim()[1], axis.get_xlabel()) == (1, "accuracy")


def test_heat_map_shows_the_share_of_each_task_s_images() -> None:
    statistics = PathStatistics()
    statistics.update(connector_trace([(1, 0, 2)] * 3 + [(0, 0, 0)]), ["a"] * 4)
    statistics.update(connector_trace([(1, 0, 2), (2, 2, 2), (2, 2, 1), (0, 1, 1)]), ["b"] * 4)
    axis, bar = plots.paths_by_task(statistics, limit=2).axes
    # 1-0-2 has (3/4 + 1/4) / 2; the four others have 1/8 each, of which 0-0-0 is the lowest
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1-0-2", "0-0-0", "others"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a\nn = 4", "b\nn = 4"]
    (image,) = axis.images
    assert image.get_array().tolist() == [[0.75, 0.25], [0.25, 0], [0, 0.75]]
    assert [text.get_text() for text in axis.texts] == ["75.0%", "25.0%", "25.0%", "0", "0", "75.0%"]
    assert axis.get_ylabel() == "experts of layers 2, 3, 5"
    assert bar.get_ylabel() == "share of a task's images"


def test_heat_map_without_others_has_no_row_for_them() -> None:
    statistics = PathStatistics()
    statistics.update(connector_trace([(1, 0, 2), (0, 0, 0)]), ["a", "b"])
    axis, _ = plots.paths_by_task(statistics).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0-0-0", "1-0-2"]
    assert axis.images[0].get_array().tolist() == [[0, 1], [1, 0]]


def test_load_of_a_connector_s_experts_is_cut_by_task() -> None:
    statistics = PathStatistics()
    statistics.update(connector_trace([(1, 0), (1, 2), (0, 0), (1, 0)], layers=(4, 5)), ["a", "a", "a", "b"])
    first, second = plots.expert_load_by_task(statistics).axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("Layer 4", "Layer 5")
    # expert by expert, task a before task b
    assert [bar.get_width() for bar in first.patches] == pytest.approx([1 / 3, 0, 2 / 3, 1, 0, 0])
    assert [bar.get_x() for bar in first.patches] == pytest.approx([0, 0, 1 / 3, 0, 1, 1])
    assert [bar.get_width() for bar in second.patches] == pytest.approx([2 / 3, 1, 0, 0, 1 / 3, 0])


def adapter_counts(
    names: Sequence[str], choices: Any, clusters: Sequence[int] | None, **fields: Any
) -> AdapterStatistics:
    statistics = AdapterStatistics("cluster", **({"has_universal": True} | fields))
    statistics.update(adapter_trace(choices, clusters=clusters), names)
    return statistics


# two training samples of cluster 0 and 2, two of a task of cluster 4; (expert, gate) at q_proj and v_proj of layer 0
TRAINING = (((0, 0.5), (2, 0.75)), ((1, 1.0), (2, 0.25)))
TASK = (((2, 0.5), (0, 0.5)), ((2, 1.0), (1, 0.5)))


def test_clusters_of_training_data_stand_above_those_of_tasks() -> None:
    sample = InstructionSample(3, {"a": [Instruction("x", 0)] * 3 + [Instruction("y", 2)], "b": [Instruction("z", 1)]})
    evaluation = adapter_counts(["t", "t"], TASK, [4, 0])
    figure = plots.clusters_by_dataset(sample, evaluation)
    assert figure is not None
    axis, bar = figure.axes
    (image,) = axis.images
    # the task has a cluster that the sample never had
    assert image.get_array().tolist() == [[0.75, 0, 0.25, 0, 0], [0, 1, 0, 0, 0], [0.5, 0, 0, 0, 0.5]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a  (n = 4)", "b  (n = 1)", "t  (n = 2)"]
    assert [text.get_text() for text in axis.texts[:5]] == ["75%", "0", "25%", "0", "0"]
    assert dotted_lines(axis) == [1.5]
    assert (axis.get_xlabel(), bar.get_ylabel()) == ("cluster", "share of a row")
    alone = plots.clusters_by_dataset(sample, None, label="dataset")
    assert alone is not None
    assert dotted_lines(alone.axes[0]) == []
    assert alone.axes[0].get_xlabel() == "dataset"
    assert plots.clusters_by_dataset(None, None) is None
    unknown = InstructionSample(None, {"a": [Instruction("x", None)]})
    assert plots.clusters_by_dataset(unknown, adapter_counts(["t", "t"], TASK, None)) is None


def dotted_lines(axis: Axes) -> list[float]:
    """Heights of the lines that are neither white nor whole."""
    return [float(np.asarray(line.get_ydata())[0]) for line in axis.lines if line.get_linestyle() not in ("-", "None")]


def test_experts_by_dataset_have_a_panel_a_linear() -> None:
    training, evaluation = adapter_counts(["a", "b"], TRAINING, [0, 2]), adapter_counts(["t", "t"], TASK, [4, 4])
    figure = plots.experts_by_subset(training, evaluation)
    assert figure is not None
    query, value, _ = figure.axes
    assert query.get_title(loc="left") == "self_attn.q_proj, layer 0"
    assert query.images[0].get_array().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert value.images[0].get_array().tolist() == [[0, 0, 1], [0, 0, 1], [0.5, 0.5, 0]]
    assert [label.get_text() for label in query.get_yticklabels()] == ["a", "b", "t"]
    assert plots.experts_by_subset(None, None) is None


def test_shown_linears_are_spread_over_layers() -> None:
    sites = [Site(f"adapter.{name}", layer) for layer in range(9) for name in ("q", "v")]
    assert [sites[place] for place in shown_linears(sites)] == [
        Site(f"adapter.{name}", layer) for name in ("q", "v") for layer in (0, 4, 8)
    ]
    many = [Site(f"adapter.{name}", 0) for name in "abcdefgh"]
    assert [linear_name(many[place]) for place in shown_linears(many)] == ["a", "b", "d", "e", "g", "h"]


def test_a_cluster_s_expert_is_the_most_frequent_one() -> None:
    statistics = adapter_counts(["a"] * 4, (*TRAINING, *TASK), [7, 3, 3, 3])
    figure = plots.experts_by_cluster(statistics)
    assert figure is not None
    query, value = figure.axes
    assert [np.asarray(axis.collections[0].get_array()).ravel().tolist() for axis in (query, value)] == [[2, 0], [0, 2]]
    assert [label.get_text() for label in query.get_yticklabels()] == ["3", "7"]
    assert [label.get_text() for label in query.get_xticklabels()] == ["0"]
    assert plots.experts_by_cluster(adapter_counts(["a", "b"], TRAINING, None)) is None


def test_weight_of_the_universal_expert_is_what_gates_leave() -> None:
    training, evaluation = adapter_counts(["a", "b"], TRAINING, [0, 2]), adapter_counts(["t", "t"], TASK, [4, 4])
    figure = plots.universal_weight(training, evaluation)
    assert figure is not None
    (axis,) = figure.axes
    # a: 1 - (0.5 + 0.75) / 2; b: 1 - (1 + 0.25) / 2; t: linears 0.25 and 0.5
    assert [bar.get_width() for bar in axis.patches[:3]] == pytest.approx([0.375, 0.375, 0.375])
    assert [text.get_text() for text in axis.texts] == ["mean 0.375"] * 3
    lines = [np.asarray(line.get_xdata()).tolist() for line in axis.lines[:6:2]]
    assert lines == [pytest.approx([0.25, 0.5]), pytest.approx([0, 0.75]), pytest.approx([0.25, 0.5])]
    assert dotted_lines(axis) == [0, 1.5]  # a gate that knows nothing, and the border
    assert plots.universal_weight(adapter_counts(["a", "b"], TRAINING, None, has_universal=False), None) is None


def test_map_has_a_panel_by_dataset_and_one_by_cluster() -> None:
    known = tuple(Instruction(text, cluster) for text, cluster in (("x", 0), ("y", 0), ("z", 3)))
    positions = np.array([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    found = InstructionMap(
        dataset=("a", "b", "b"), instruction=known, positions=positions, same_dataset=0.5, by_chance=0.5
    )
    left, right = plots.instruction_map(found).axes
    assert [np.asarray(points.get_offsets()).tolist() for points in left.collections] == [
        [[0, 0]], [[1, 1], [9, 9]],
    ]  # fmt: skip
    assert [points.get_label() for points in left.collections] == ["a", "b"]
    assert [text.get_text() for text in right.texts] == ["0", "3"]
    # the second dataset has y three times, and x beside the first one's
    shared = replace(
        found,
        dataset=("a", "b", "b", "b", "b"),
        instruction=(known[0], known[0], known[1], known[1], known[1]),
        positions=np.array([[0.0, 0.0]] * 2 + [[10.0, 1.0]] * 3),
    )
    first, second = plots.instruction_map(shared).axes[0].collections
    assert np.asarray(second.get_offsets()).tolist() == [[pytest.approx(0.18), 0], [10, 1]]
    assert second.get_sizes() / first.get_sizes() == pytest.approx([1, np.sqrt(3)])
    unknown = replace(found, instruction=tuple(Instruction(one.text, None) for one in known))
    assert len(plots.instruction_map(unknown).axes) == 1


def test_parts_of_the_model_have_a_figure_of_training_each() -> None:
    def step(number: int, load: dict[str, list[int]]) -> dict:
        counts = {layer: {"language": [0] * len(row), "vision": row} for layer, row in load.items()}
        return {"global_step": number, "expert_load": counts}

    steps = [step(1, {"connector.10": [1, 1, 2], "connector.9": [4, 0, 0], "0": [5, 5]})]
    figure = plots.load_over_training(steps, part="connector")
    assert figure is not None
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Layer 9", "Layer 10"]
    assert figure.axes[0].get_ylabel() == "images\nshare of assignments"
    assert [line.get_ydata()[0] for line in figure.axes[1].lines[:3]] == [0.25, 0.25, 0.5]
    figure = plots.load_over_training(steps)
    assert figure is not None
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Layer 0"]
    assert plots.load_over_training([step(1, {"0": [5, 5]})], part="connector") is None
    # a connector that never saw an image
    assert plots.load_over_training([step(1, {"connector.9": [0, 0, 0]})], part="connector") is None


def test_load_bars_are_shares_of_a_modality(hand_trace: RoutingTrace) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace)
    (axis,) = plots.load_by_modality(statistics).axes
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == pytest.approx([3 / 6, 2 / 6, 0, 1 / 6, 5 / 14, 5 / 14, 2 / 14, 2 / 14])


def test_figures_without_data_are_none(hand_trace: RoutingTrace) -> None:
    statistics = RoutingStatistics()
    statistics.update(hand_trace)
    assert plots.foreground_agreement(statistics) is None
    assert plots.tail_overlay([]) is None
    assert plots.load_over_training([{"global_step": 1, "expert_load": None}]) is None


def test_global_settings_of_matplotlib_are_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plots.save(plots.accuracy_by_task([Score("what", 0.9, 0.1, 50)]), tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 800
