"""Figures of evaluation: accuracy, token load by modality, RPV histograms, tail tokens against the foreground."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from moe_lvlm.analysis.measures import MODALITIES, site_name
from moe_lvlm.analysis.plots.style import (
    BLUE,
    CHANCE,
    LANGUAGE,
    VERMILION,
    VISION,
    label_shares,
    panels,
    percent,
    styled,
)
from moe_lvlm.analysis.run_folder import Score
from moe_lvlm.analysis.statistics import Agreement, RoutingStatistics, SiteStatistics

_COLORS = (LANGUAGE, VISION)
_NAMES = ("language tokens", "vision tokens")
_HISTOGRAM_BARS = 50
_HISTOGRAM_COLUMNS = 3
_LOAD_COLUMNS = 3
_TICKED_EXPERTS = 8
_LABELLED_EXPERTS = 4
_LABELLED_SHARE = 0.06


def accuracy_by_task(scores: Sequence[Score]) -> Figure:
    """Accuracy of each task as a bar, with its majority baseline as a mark. A score that is no share (CIDEr) stands on the
    same axis a hundredfold, as is usual, and says so."""
    with styled():
        figure, (axis,) = panels(1, max_columns=1, width=7.0, height=1.1 + 0.42 * len(scores))
        y = np.arange(len(scores))
        accuracy = [score.accuracy for score in scores]
        are_shares = all(score.is_share for score in scores)
        right = max([1.0, *(1.08 * max(score.accuracy, score.majority) for score in scores if not score.is_share)])
        axis.barh(y, accuracy, height=0.58, color=BLUE, label="model")
        for place, score in enumerate(scores):
            label = "majority answer" if place == 0 else None
            axis.plot([score.majority] * 2, [place - 0.38, place + 0.38], color=VERMILION, linewidth=2.4, label=label)
            text = f"{score.accuracy:.1%}" if score.is_share else f"{100 * score.accuracy:.1f} {score.unit}"
            inside = score.accuracy > (0.12 if score.is_share else 0.25) * right
            axis.text(
                score.accuracy + (-0.012 if inside else 0.012) * right,
                place,
                text,
                va="center",
                ha="right" if inside else "left",
                color="white" if inside else "#22262B",
                fontweight="bold",
            )
        axis.set_yticks(y, [f"{score.task}  (n = {score.n})" for score in scores])
        axis.invert_yaxis()
        axis.set_xlim(0, right)
        axis.xaxis.set_major_formatter(percent if are_shares else lambda value, _: f"{100 * value:g}")
        axis.set_xlabel("accuracy" if are_shares else "accuracy in %, or 100 x CIDEr")
        axis.grid(visible=False, axis="y")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=2)
    return figure


def load_by_modality(statistics: RoutingStatistics) -> Figure:
    """Share of each modality's assignments that every expert gets, one panel a MoE layer."""
    with styled():
        sites = list(statistics.items())
        figure, axes = panels(len(sites), max_columns=_LOAD_COLUMNS, width=3.3, height=2.5, share_y=True)
        for axis, (site, values) in zip(axes, sites, strict=True):
            _load_bars(axis, values)
            axis.set_title(f"Layer {site_name(site)}")
        for axis in axes[::_LOAD_COLUMNS]:
            axis.set_ylabel("share of assignments")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _load_bars(axis: Axes, values: SiteStatistics) -> None:
    load = values.load.astype(np.float64)
    share = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
    x = np.arange(values.num_experts)
    for row, (name, color) in enumerate(zip(_NAMES, _COLORS, strict=True)):
        offset = (row - 0.5) * 0.4
        bars = axis.bar(x + offset, share[row], width=0.38, color=color, label=name)
        if values.num_experts <= _LABELLED_EXPERTS:
            label_shares(axis, bars, above=_LABELLED_SHARE)
    axis.axhline(1 / values.num_experts, color=CHANCE, linewidth=1.2, linestyle=(0, (4, 3)), label="even load")
    axis.set_xticks(x if values.num_experts <= _TICKED_EXPERTS else x[:: values.num_experts // 4])
    axis.set_xlabel("expert")
    axis.yaxis.set_major_formatter(percent)
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.12)


def rpv_histogram(statistics: RoutingStatistics) -> Figure:
    """Histogram of the routing probability variance of vision and language tokens, one panel a MoE layer, log counts."""
    with styled():
        sites = list(statistics.items())
        figure, axes = panels(len(sites), max_columns=_HISTOGRAM_COLUMNS, width=3.3, height=2.5, share_y=True)
        for axis, (site, values) in zip(axes, sites, strict=True):
            _histogram_steps(axis, values)
            axis.set_title(f"Layer {site_name(site)}")
            axis.set_xlabel("RPV of a token")
        for axis in axes[::_HISTOGRAM_COLUMNS]:
            axis.set_ylabel("share of tokens")
        mean = Line2D([], [], color=CHANCE, linewidth=1.2, linestyle=(0, (2, 2)), label="mean of each")
        figure.legend(handles=[*_present(axes), mean], loc="outside upper center", ncols=3)
    return figure


def _present(axes: Sequence[Axes]) -> list[Any]:
    """Legend entries of all panels, each once: a layer may lack a modality."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values())


def _histogram_steps(axis: Axes, values: SiteStatistics) -> None:
    """Both modalities over the range in use; each as a share of its own tokens, since there are far more of vision."""
    counts, edges = merged_bins(values.histogram, values.edges)
    for row, (modality, name, color) in enumerate(zip(MODALITIES, _NAMES, _COLORS, strict=True)):
        total, mean = int(values.tokens[row]), values.mean_rpv(modality)
        if mean is None:
            continue
        share = counts[row] / total
        axis.stairs(share, edges, fill=True, color=color, alpha=0.18)
        axis.stairs(share, edges, color=color, linewidth=1.3, label=name)
        axis.axvline(mean, color=color, linewidth=1.2, linestyle=(0, (2, 2)))
    axis.set_yscale("log")
    axis.set_xlim(edges[0], edges[-1])
    axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
    axis.locator_params(axis="x", nbins=5)


def merged_bins(
    histogram: NDArray[np.int64], edges: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Fine bins [M, H] over the range that holds any token, merged into about 50 equal bars. Counts are kept."""
    used = np.flatnonzero(histogram.sum(axis=0))
    last = int(used[-1]) + 1 if used.size else 1
    width = max(1, -(-last // _HISTOGRAM_BARS))
    bars = -(-last // width)
    padded = np.zeros((histogram.shape[0], bars * width), dtype=np.int64)
    padded[:, :last] = histogram[:, :last]
    step = edges[1] - edges[0]
    return padded.reshape(histogram.shape[0], bars, width).sum(axis=2), np.arange(bars + 1) * width * step


def foreground_agreement(statistics: RoutingStatistics) -> Figure | None:
    """Precision, recall and AUC of tail tokens for the foreground by layer, beside chance. None without masks."""
    rows = [(site_name(site), found) for site, values in statistics.items() if (found := values.foreground_agreement())]
    if not rows:
        return None
    titles = (
        "Tail tokens on the\nforeground (precision)",
        "Foreground tokens in\nthe tail (recall)",
        "AUC of RPV for\nthe foreground",
    )
    with styled():
        figure, axes = panels(3, max_columns=3, width=2.9, height=1.7 + 0.24 * len(rows), share_y=True)
        for axis, title, index in zip(axes, titles, range(3), strict=True):
            _beside_chance(axis, [_value_and_chance(found)[index] for _, found in rows])
            axis.set_title(title)
        axes[0].set_yticks(range(len(rows)), [f"layer {name}" for name, _ in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        figure.legend(handles=_agreement_legend(), loc="outside lower center", ncols=3)
    return figure


def _agreement_legend() -> list[Line2D]:
    dot: dict[str, Any] = {"marker": "o", "markersize": 7, "linestyle": "none"}
    return [
        Line2D([], [], marker="|", markersize=12, markeredgewidth=2.2, color=CHANCE, linestyle="none", label="chance"),
        Line2D([], [], color=BLUE, label="measured, above chance", **dot),
        Line2D([], [], color=VERMILION, label="measured, below chance", **dot),
    ]


def _value_and_chance(found: Agreement) -> tuple[tuple[float | None, float], ...]:
    return (
        (found.precision, found.foreground_share),
        (found.recall, found.tail_share),
        (found.auc, 0.5),
    )


def _beside_chance(axis: Axes, pairs: Sequence[tuple[float | None, float]]) -> None:
    """A bar from chance to the value: blue above chance, vermilion below it."""
    for place, (value, chance) in enumerate(pairs):
        axis.plot(chance, place, marker="|", markersize=15, markeredgewidth=2.2, color=CHANCE, linestyle="none")
        if value is None:
            axis.text(0.5, place, "not defined", ha="center", va="center", color=CHANCE)
            continue
        color = BLUE if value >= chance else VERMILION
        axis.plot([chance, value], [place, place], color=color, linewidth=2.4, alpha=0.55)
        axis.plot(value, place, marker="o", markersize=7, color=color, linestyle="none")
        axis.annotate(
            f"{value:.2f}", (value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set_xlim(-0.03, 1.03)
    axis.grid(visible=False, axis="y")
