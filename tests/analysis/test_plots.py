"""Figures: what is drawn, read back from the figure's artists."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from moe_lvlm.analysis import plots
from moe_lvlm.analysis.paths import PathStatistics
from moe_lvlm.analysis.plots.routing import merged_bins
from moe_lvlm.analysis.plots.style import smooth, spread
from moe_lvlm.analysis.run_folder import Score
from moe_lvlm.analysis.statistics import RoutingStatistics
from moe_lvlm.routing.trace import RoutingTrace
from tests.analysis.traces import connector_trace


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
