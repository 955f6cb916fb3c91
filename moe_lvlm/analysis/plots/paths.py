"""Figures of a connector's experts: paths by task (Q-MoE figure 3), and the load of every layer by task."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from moe_lvlm.analysis.paths import PathStatistics, path_label
from moe_lvlm.analysis.plots.style import INK, SHARES, expert_colors, label_shares, panels, percent, styled

TOP_PATHS = 6
"""As many rows has the paper's figure."""

_DARK_FROM = 0.5
_LOAD_COLUMNS = 3
_LABELLED_SHARE = 0.12
_UPRIGHT_NAMES = 6


def paths_by_task(statistics: PathStatistics, *, limit: int = TOP_PATHS) -> Figure:
    """Heat map of the most frequent paths and all others (rows) by task (columns): share of a task's images."""
    num_tasks, num_rows = len(statistics.tasks), min(limit, len(statistics.overall())) + 1
    with styled():
        width = 3.4 + (1.0 if num_tasks <= _UPRIGHT_NAMES else 0.68) * num_tasks
        size = (max(width, 6.0), 1.5 + 0.4 * num_rows)
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        image = draw_paths_by_task(axis, statistics, limit=limit)
        figure.colorbar(image, ax=axis, format=percent, label="share of a task's images", fraction=0.05, pad=0.02)
    return figure


def draw_paths_by_task(axis: Axes, statistics: PathStatistics, *, limit: int = TOP_PATHS) -> AxesImage:
    """The heat map of `paths_by_task` on axes of the caller's, who holds the style; what a colour bar describes."""
    paths = statistics.top_paths(limit)
    shares = statistics.shares(paths)
    labels = [path_label(path) for path in paths]
    if len(statistics.overall()) > len(paths):
        labels.append("others")
    else:
        shares = shares[:-1]
    image = axis.imshow(shares, cmap=SHARES, vmin=0, vmax=float(shares.max()), aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        color = "white" if share > _DARK_FROM * shares.max() else INK
        axis.text(column, row, f"{share:.1%}" if share else "0", ha="center", va="center", color=color, fontsize=8)
    axis.set_yticks(range(len(labels)), labels)
    names = [f"{task}\nn = {statistics.counts(task).total():,}" for task in statistics.tasks]
    axis.set_xticks(range(len(names)), names)
    if len(names) > _UPRIGHT_NAMES:
        axis.tick_params(axis="x", labelrotation=35)
        for text in axis.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    axis.set_ylabel(f"experts of layers {', '.join(map(str, statistics.layers))}")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _separate(axis, num_rows=len(labels), num_columns=len(names), has_others=labels[-1] == "others")
    return image


def _separate(axis: Axes, *, num_rows: int, num_columns: int, has_others: bool) -> None:
    """White lines between cells, a wide one above the row of the others."""
    for column in range(1, num_columns):
        axis.axvline(column - 0.5, color="white", linewidth=2)
    for row in range(1, num_rows):
        axis.axhline(row - 0.5, color="white", linewidth=6 if has_others and row == num_rows - 1 else 2)


def expert_load_by_task(statistics: PathStatistics) -> Figure:
    """Share of each task's images that every expert gets, one panel a Task-Experts layer."""
    with styled():
        height = 0.95 + 0.3 * len(statistics.tasks)
        figure, axes = panels(len(statistics.layers), max_columns=_LOAD_COLUMNS, width=3.3, height=height, share_y=True)
        for place, (axis, layer) in enumerate(zip(axes, statistics.layers, strict=True)):
            _load_bars(axis, statistics, place)
            axis.set_title(f"Layer {layer}")
            axis.set_xlim(0, 1)
            axis.xaxis.set_major_formatter(percent)
            axis.grid(visible=False, axis="y")
        axes[0].set_yticks(range(len(statistics.tasks)), statistics.tasks)
        axes[0].set_ylim(len(statistics.tasks) - 0.5, -0.5)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(statistics.num_experts, 8))
    return figure


def _load_bars(axis: Axes, statistics: PathStatistics, place: int) -> None:
    """A bar a task, cut into experts. place: of the layer in a path."""
    load = np.array([statistics.expert_load(task)[place] for task in statistics.tasks], dtype=np.float64)
    share = load / load.sum(axis=1, keepdims=True)
    y, left = np.arange(len(share)), np.zeros(len(share))
    for expert, color in enumerate(expert_colors(statistics.num_experts)):
        bars = axis.barh(y, share[:, expert], left=left, height=0.7, color=color, label=f"expert {expert}")
        label_shares(axis, bars, above=_LABELLED_SHARE)
        left = left + share[:, expert]
