"""Figures of the papers, of our runs: LTDR's 1b, 4 and 5, Q-MoE's 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_lvlm.analysis.measures import MODALITIES, site_name
from moe_lvlm.analysis.plots.paths import paths_by_task
from moe_lvlm.analysis.plots.routing import merged_bins
from moe_lvlm.analysis.plots.style import CHANCE, INK, LANGUAGE, SKY, VISION, panels, percent, save, styled
from moe_lvlm.analysis.statistics import RoutingStatistics, SiteStatistics
from moe_lvlm.routing.types import Modality, Site
from reproducing.paper import Table
from reproducing.results import Results

_COLORS = {Modality.LANGUAGE: LANGUAGE, Modality.VISION: VISION}
Panel = Callable[[Axes, SiteStatistics], None]


def draw(paper: str, table: Table, results: Results, folder: Path) -> Path | None:
    """Write a figure's PNG; None where no run of it has what it shows.

    Raises:
        ValueError: the table is no figure that we draw.
    """
    drawers = {
        "ltdr.figure1b": _figure_1b,
        "ltdr.figure4": _figure_4,
        "ltdr.figure5": _figure_5,
        "qmoe.figure3": _paths_by_task,
    }
    name = f"{paper}.{table.name}"
    if name not in drawers:
        raise ValueError(f"{name}: no figure; allowed: {', '.join(drawers)}")
    with styled():
        figure = drawers[name](table, results)
    if figure is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{paper}-{table.name}.png"
    save(figure, path)
    return path


def pooled(results: Results, recipe: str) -> RoutingStatistics | None:
    """Statistics of all seeds of a row together. Experts have no identity across seeds: loads do not pool."""
    total: RoutingStatistics | None = None
    for one in results.by_row.get(recipe, ()):
        if one is None or one.routing is None:
            continue
        if total is None:
            total = RoutingStatistics(foreground_threshold=one.routing.foreground_threshold)
        total.merge(one.routing)
    return total


def _first(results: Results, recipe: str) -> RoutingStatistics | None:
    return next((one.routing for one in results.by_row.get(recipe, ()) if one and one.routing), None)


def _figure_1b(table: Table, results: Results) -> Figure | None:
    """Share of tokens by RPV: language with balancing, vision without, vision with."""
    baseline, dar = (pooled(results, row.recipe) for row in table.rows) if len(table.rows) == 2 else (None, None)
    columns = [
        ("language, balanced", baseline, lambda axis, site: _histogram(axis, site, Modality.LANGUAGE)),
        ("vision, not balanced (DAR)", dar, lambda axis, site: _histogram(axis, site, Modality.VISION)),
        ("vision, balanced", baseline, lambda axis, site: _histogram(axis, site, Modality.VISION)),
    ]
    return _panels(columns, x_label="RPV of a token", y_label="share of tokens")


def _figure_4(table: Table, results: Results) -> Figure | None:
    """Share of each modality's assignments by expert; of the first seed, since experts have no identity across seeds."""
    columns = [(row.label, _first(results, row.recipe), _loads) for row in table.rows]
    figure = _panels(columns, x_label="expert", y_label="share of assignments")
    if figure is not None:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _figure_5(table: Table, results: Results) -> Figure | None:
    """Vision tokens by RPV, with the means of head, tail and all."""
    columns = [(row.label, pooled(results, row.recipe), _head_and_tail) for row in table.rows]
    figure = _panels(columns, x_label="RPV of a vision token", y_label="share of vision tokens")
    if figure is not None:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _panels(
    columns: Sequence[tuple[str, RoutingStatistics | None, Panel]], *, x_label: str, y_label: str
) -> Figure | None:
    """A row of panels a MoE layer, a column a variant."""
    sites = sorted({site for _, statistics, _ in columns if statistics for site, _ in statistics.items()})
    if not sites:
        return None
    width = len(columns)
    figure, axes = panels(len(sites) * width, max_columns=width, width=3.1, height=2.2)
    for place, axis in enumerate(axes):
        site = sites[place // width]
        name, statistics, draw_panel = columns[place % width]
        axis.set_title(f"{name}\nlayer {site_name(site)}", fontsize=8.5)
        _draw_or_say(axis, statistics, site, draw_panel)
        if place % width == 0:
            axis.set_ylabel(y_label)
        if place >= len(axes) - width:
            axis.set_xlabel(x_label)
    for start in range(0, len(axes), width):  # of one layer, to be compared
        right = max(axis.get_xlim()[1] for axis in axes[start : start + width])
        for axis in axes[start : start + width]:
            axis.set_xlim(axis.get_xlim()[0], right)
    return figure


def _draw_or_say(axis: Axes, statistics: RoutingStatistics | None, site: Site, draw_panel: Panel) -> None:
    if statistics is None or site not in dict(statistics.items()):
        axis.set_xlim(0, 1e-9)
        axis.text(0.5, 0.5, "no run", ha="center", va="center", color=CHANCE, transform=axis.transAxes)
        return
    draw_panel(axis, statistics[site])
    axis.yaxis.set_major_formatter(percent)


def _bars(axis: Axes, values: SiteStatistics, modality: Modality) -> None:
    counts, edges = merged_bins(values.histogram[[MODALITIES.index(modality)]], values.edges)
    share = counts[0] / max(counts.sum(), 1)
    axis.stairs(share, edges, fill=True, color=_COLORS[modality], alpha=0.75)
    axis.set_xlim(0, edges[-1])
    axis.xaxis.set_major_locator(MaxNLocator(4))  # small numbers are long: more of them run into each other


def _histogram(axis: Axes, values: SiteStatistics, modality: Modality) -> None:
    _bars(axis, values, modality)
    mean = values.mean_rpv(modality)
    if mean is not None:
        axis.axvline(mean, color=CHANCE, linestyle=(0, (2, 2)), linewidth=1.2)


def _loads(axis: Axes, values: SiteStatistics) -> None:
    x = np.arange(values.num_experts)
    for row, modality in enumerate(MODALITIES):
        load = values.load[row].astype(np.float64)
        axis.bar(
            x + (row - 0.5) * 0.4, load / max(load.sum(), 1), width=0.38, color=_COLORS[modality],
            label=modality.name.lower(),
        )  # fmt: skip
    axis.axhline(1 / values.num_experts, color=CHANCE, linewidth=1.2, linestyle=(0, (4, 3)), label="even load")
    axis.set_xticks(x)


def _head_and_tail(axis: Axes, values: SiteStatistics) -> None:
    _bars(axis, values, Modality.VISION)
    means = (
        ("head", values.mean_head_rpv, SKY),
        ("all", values.mean_rpv(Modality.VISION), CHANCE),
        ("tail", values.mean_tail_rpv, INK),
    )
    for place, (name, mean, color) in enumerate(means):
        if mean is None:
            continue
        axis.axvline(mean, color=color, linewidth=1.6, label=f"mean of {'all' if name == 'all' else f'the {name}'}")
        axis.text(
            0.98, 0.94 - 0.11 * place, f"{name} {mean:.4f}", transform=axis.transAxes, fontsize=7.5, ha="right", va="top"
        )  # fmt: skip


def _paths_by_task(table: Table, results: Results) -> Figure | None:
    """Shares of tasks by path; of the first seed of the first row, since experts have no identity across seeds."""
    found = (one.paths for row in table.rows for one in results.by_row.get(row.recipe, ()) if one is not None)
    paths = next((one for one in found if one is not None), None)
    return None if paths is None else paths_by_task(paths)
