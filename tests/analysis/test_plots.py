"""Figures: what is drawn, read back from the figure's artists."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from moe_lvlm.analysis import plots
from moe_lvlm.analysis.plots.routing import merged_bins
from moe_lvlm.analysis.plots.style import smooth, spread
from moe_lvlm.analysis.run_folder import Score
from moe_lvlm.analysis.statistics import RoutingStatistics
from moe_lvlm.routing.trace import RoutingTrace


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
