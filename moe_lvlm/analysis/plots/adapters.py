"""Figures of LoRA experts behind a gate (MoCLE figures 4 to 7): instructions in the plane, clusters by dataset, experts
by dataset and by cluster, weight of the universal expert.

Rows are subsets: datasets of the training data, below a dotted line the tasks of the evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from moe_lvlm.analysis.adapters import AdapterStatistics, SubsetCounts, linear_name
from moe_lvlm.analysis.instructions import InstructionMap, InstructionSample
from moe_lvlm.analysis.plots.style import (
    BLUE,
    CHANCE,
    CYCLE,
    FAINT,
    INK,
    ORANGE,
    SHARES,
    expert_colors,
    percent,
    spread,
    styled,
)
from moe_lvlm.routing.types import Site

_MARKERS = ("o", "^", "s", "D", "v", "P")
_SHOWN_LINEARS = 6
_LABELLED_COLUMNS = 8
_TICKS = 16
_ROW = 0.24
_DARK_FROM = 0.5
_LEFT = 2.0
_LABEL_ROOM = 0.035
_SIDE_STEP = 0.018
_POINT = 16.0


class Subset(NamedTuple):
    """A row. is_training: of the training data, else of the evaluation."""

    name: str
    is_training: bool
    counts: SubsetCounts


def subsets(training: AdapterStatistics | None, evaluation: AdapterStatistics | None) -> list[Subset]:
    """Datasets of the training data, then tasks of the evaluation."""
    parts = ((True, training), (False, evaluation))
    return [
        Subset(name, is_training, counts)
        for is_training, statistics in parts
        if statistics is not None
        for name, counts in statistics.subsets.items()
    ]


def instruction_map(found: InstructionMap) -> Figure:
    """Instructions in the plane: on the left by dataset (MoCLE figure 4), on the right by cluster, where known."""
    has_clusters = all(one.cluster is not None for one in found.instruction)
    with styled():
        figure = Figure(figsize=(11.5 if has_clusters else 7.5, 5.4), layout="constrained")
        axes = figure.subplots(1, 2 if has_clusters else 1, squeeze=False)[0]
        _by_dataset(axes[0], found)
        if has_clusters:
            _by_cluster(axes[1], found)
        handles = [
            Line2D([], [], color=color, marker=marker, markersize=7, markeredgewidth=0, linestyle="none", label=name)
            for name, (color, marker) in _dataset_styles(found).items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7))
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(True)
            axis.grid(visible=False)
    return figure


def _dataset_styles(found: InstructionMap) -> dict[str, tuple[str, str]]:
    """Colour and marker together tell datasets apart: six colours, and another marker from dataset to dataset."""
    return {
        name: (CYCLE[place % len(CYCLE)], _MARKERS[(place + place // len(CYCLE)) % len(_MARKERS)])
        for place, name in enumerate(dict.fromkeys(found.dataset))
    }


def _by_dataset(axis: Axes, found: InstructionMap) -> None:
    count = Counter((name, one.text) for name, one in zip(found.dataset, found.instruction, strict=True))
    position = {one.text: place for one, place in zip(found.instruction, found.positions, strict=True)}
    step = np.array([_SIDE_STEP * float(np.ptp(found.positions[:, 0])), 0.0])
    styles = _dataset_styles(found)
    names = list(styles)
    for place, (name, (color, marker)) in enumerate(styles.items()):
        texts = [text for owner, text in count if owner == name]
        # datasets that share a text stand side by side
        before = [sum((other, text) in count for other in names[:place]) for text in texts]
        points = np.array([position[text] + shift * step for text, shift in zip(texts, before, strict=True)])
        axis.scatter(
            points[:, 0],
            points[:, 1],
            s=_sizes([count[name, text] for text in texts]),
            alpha=0.75,
            linewidths=0,
            marker=marker,
            color=color,
            label=name,
        )
    axis.set_title("by dataset")


def _by_cluster(axis: Axes, found: InstructionMap) -> None:
    """Neighbouring numbers have other colours; a cluster's number stands above its middle point, where there is room: a
    larger cluster comes first."""
    count = Counter(found.instruction)
    position = dict(zip(found.instruction, found.positions, strict=True))
    room = np.ptp(found.positions, axis=0) * _LABEL_ROOM
    labelled: list[NDArray[np.float64]] = []
    sizes = Counter(one.cluster for one in found.instruction)
    for cluster in sorted(sizes, key=lambda cluster: (-sizes[cluster], cluster)):
        members = [one for one in count if one.cluster == cluster]
        points = np.array([position[one] for one in members])
        color = CYCLE[int(cluster or 0) % len(CYCLE)]
        area = _sizes([count[one] for one in members])
        axis.scatter(points[:, 0], points[:, 1], s=area, alpha=0.6, linewidths=0, color=color)
        # the point nearest to the median: the mean of a cluster in two pieces lies in neither
        middle = points[np.argmin(((points - np.median(points, axis=0)) ** 2).sum(axis=1))]
        if any((abs(middle - other) < room).all() for other in labelled):
            continue
        labelled.append(middle)
        axis.annotate(
            str(cluster),
            middle,
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=INK,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
            zorder=3,
        )
    axis.set_title("by cluster")


def _sizes(counts: Sequence[int]) -> NDArray[np.float64]:
    """Areas of points that stand for so many instructions."""
    return _POINT * np.sqrt(np.array(counts, dtype=np.float64))


def clusters_by_dataset(
    sample: InstructionSample | None, evaluation: AdapterStatistics | None, *, label: str = "cluster"
) -> Figure | None:
    """Heat map of subsets by cluster (MoCLE figure 5): share of a subset's instructions. None where none is known.

    label: what a column is.
    """
    rows: list[tuple[str, NDArray[np.int64]]] = []
    num_training = 0
    if sample is not None and sample.has_clusters:
        rows += list(zip(sample.datasets, sample.clusters_by_dataset(), strict=True))
        num_training = len(rows)
    if evaluation is not None:
        tasks = {name: counts.clusters for name, counts in evaluation.subsets.items() if counts.clusters}
        size = max([len(rows[0][1]) if rows else 0, *(max(counts) + 1 for counts in tasks.values())])
        rows = [(name, np.pad(counts, (0, size - len(counts)))) for name, counts in rows]
        rows += [(name, np.array([counts[cluster] for cluster in range(size)])) for name, counts in tasks.items()]
    if not rows:
        return None
    counts_DK = np.array([counts for _, counts in rows], dtype=np.float64)
    shares_DK = counts_DK / counts_DK.sum(axis=1, keepdims=True)
    num_clusters = counts_DK.shape[1]
    with styled():
        width = min(_LEFT + 1.2 + 0.5 * num_clusters, 11.5)
        figure = Figure(figsize=(max(width, 6.0), 1.2 + _ROW * len(rows)), layout="constrained")
        axis = figure.subplots()
        image = _heat_map(axis, shares_DK, is_labelled=num_clusters <= _LABELLED_COLUMNS)
        names = [f"{name}  (n = {counts.sum():,})" for name, counts in rows]
        _name_rows(axis, names, num_training=num_training)
        axis.set_xticks(spread(range(num_clusters), _TICKS))
        axis.set_xlabel(label)
        figure.colorbar(image, ax=axis, format=percent, label="share of a row", fraction=0.04, pad=0.02)
    return figure


def experts_by_subset(training: AdapterStatistics | None, evaluation: AdapterStatistics | None) -> Figure | None:
    """Heat maps of subsets by LoRA expert, one a linear (MoCLE figure 6): share of a subset's choices. Up to six
    linears, evenly spread over the layers. None without samples."""
    rows, first = subsets(training, evaluation), training or evaluation
    if not rows or first is None:
        return None
    linears = first.linears
    shown = shown_linears(linears)
    num_training = sum(row.is_training for row in rows)
    with styled():
        columns = min(len(shown), 3)
        lines = -(-len(shown) // columns)
        width = max(0.34 * first.num_experts + 0.6, 1.9)
        size = (_LEFT + columns * width + 0.9, lines * (0.75 + _ROW * len(rows)) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axis in axes.flat[len(shown) :]:
            axis.remove()
        for axis, place in zip(axes.flat, shown, strict=False):
            shares_DE = np.array([row.counts.expert_shares_LE[place] for row in rows])
            image = _heat_map(axis, shares_DE, highest=1.0, is_labelled=False)
            _name_rows(axis, [row.name for row in rows], num_training=num_training)
            axis.set_title(site_title(linears[place]), fontsize=8.5)
            axis.set_xticks(spread(range(first.num_experts), _TICKS))
            axis.set_xlabel("expert")
        figure.colorbar(image, ax=axes, format=percent, label="share of a row", fraction=0.04, pad=0.02)
    return figure


def shown_linears(linears: Sequence[Site]) -> list[int]:
    """Places of up to six linears: of each name as many layers, the first and the last among them."""
    by_name: dict[str, list[int]] = {}
    for place, site in enumerate(linears):
        by_name.setdefault(linear_name(site), []).append(place)
    names = spread(list(by_name), _SHOWN_LINEARS)
    each = max(_SHOWN_LINEARS // len(names), 1)
    return [place for name in names for place in spread(by_name[name], each)]


def experts_by_cluster(statistics: AdapterStatistics) -> Figure | None:
    """The expert that most of a cluster's choices go to, at every linear: a panel a linear's name, a row a cluster, a
    column a layer. None where no cluster is known."""
    clusters = sorted(statistics.by_cluster)
    if not clusters:
        return None
    best_KL = np.array([statistics.by_cluster[cluster].argmax(axis=1) for cluster in clusters])
    names = list(dict.fromkeys(linear_name(site) for site in statistics.linears))
    layers = [[site.layer for site in statistics.linears if linear_name(site) == name] for name in names]
    colors = expert_colors(statistics.num_experts)
    with styled():
        widths = [max(0.16 * len(found), 0.9) for found in layers]
        height = 1.1 + max(min(0.16 * len(clusters), 8.0), 0.6)
        figure = Figure(figsize=(max(1.4 + sum(widths) + 0.3 * len(names), 6.0), height), layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False, sharey=True, width_ratios=widths)[0]
        for axis, name, found in zip(axes, names, layers, strict=True):
            places = [place for place, site in enumerate(statistics.linears) if linear_name(site) == name]
            axis.pcolormesh(
                best_KL[:, places],
                cmap=ListedColormap(colors),
                vmin=-0.5,
                vmax=statistics.num_experts - 0.5,
                edgecolors="white",
                linewidth=0.6,
            )
            axis.set_title(name, fontsize=8.5)
            ticks = spread(range(len(found)), 8)
            axis.set_xticks([tick + 0.5 for tick in ticks], [str(found[tick]) for tick in ticks])
            axis.set_xlabel("layer")
            axis.grid(visible=False)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        ticks = spread(range(len(clusters)), 2 * _TICKS)
        axes[0].set_yticks([tick + 0.5 for tick in ticks], [str(clusters[tick]) for tick in ticks])
        axes[0].set_ylim(len(clusters), 0)
        axes[0].set_ylabel("dataset" if statistics.gating == "dataset" else "cluster")
        handles = [Patch(color=color, label=f"expert {expert}") for expert, color in enumerate(colors)]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 8))
    return figure


def universal_weight(training: AdapterStatistics | None, evaluation: AdapterStatistics | None) -> Figure | None:
    """Mean weight of the universal expert, 1 - G, by subset (MoCLE figure 7), over all linears. None without one."""
    rows, first = subsets(training, evaluation), training or evaluation
    if not rows or first is None or not first.has_universal:
        return None
    num_training = sum(row.is_training for row in rows)
    means = [1 - row.counts.gate[0] for row in rows]
    y = np.arange(len(rows))
    with styled():
        figure = Figure(figsize=(7.5, 1.2 + 0.3 * len(rows)), layout="constrained")
        axis = figure.subplots()
        colors = [BLUE if row.is_training else ORANGE for row in rows]
        axis.barh(y, means, height=0.62, color=colors)
        even = 1 - 1 / first.num_experts
        for place, row in enumerate(rows):
            low, high = (1 - row.counts.gate_L.max(), 1 - row.counts.gate_L.min())
            axis.plot([low, high], [place] * 2, color=INK, linewidth=1.1, solid_capstyle="butt")
            axis.plot([low, high], [place] * 2, color=INK, marker="|", markersize=7, linestyle="none")
            box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
            axis.text(high + 0.012, place, f"mean {means[place]:.3f}", va="center", fontsize=8, bbox=box)
        axis.axvline(even, color=CHANCE, linewidth=1.2, linestyle=(0, (4, 3)))
        axis.set_xlim(0, even * 1.16 if first.num_experts > 1 else 1)
        names = [f"{row.name}  (n = {row.counts.samples:,})" for row in rows]
        _name_rows(axis, names, num_training=num_training, is_cut=False)
        axis.spines["bottom"].set_visible(True)
        axis.grid(visible=True, axis="x", color=FAINT)
        axis.set_xlabel("weight of the universal expert")
        figure.legend(handles=_weight_legend(rows), loc="outside upper center", ncols=4)
    return figure


def _weight_legend(rows: Sequence[Subset]) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = []
    if any(row.is_training for row in rows):
        handles.append(Patch(color=BLUE, label="training data"))
    if not all(row.is_training for row in rows):
        handles.append(Patch(color=ORANGE, label="evaluation"))
    line = Line2D([], [], color=INK, linewidth=1.1, marker="|", markersize=7, label="lowest to highest linear")
    even = Line2D([], [], color=CHANCE, linewidth=1.2, linestyle=(0, (4, 3)), label="gate that knows nothing")
    return [*handles, line, even]


def site_title(site: Site) -> str:
    """`self_attn.q_proj` of layer 3 -> "self_attn.q_proj, layer 3"."""
    return f"{linear_name(site)}, layer {site.layer}"


def _heat_map(axis: Axes, shares: NDArray[np.float64], *, highest: float | None = None, is_labelled: bool) -> AxesImage:
    top = float(shares.max()) if highest is None else highest
    image = axis.imshow(shares, cmap=SHARES, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    if is_labelled:
        for (row, column), share in np.ndenumerate(shares):
            color = "white" if share > _DARK_FROM * top else INK
            axis.text(column, row, f"{share:.0%}" if share else "0", ha="center", va="center", color=color, fontsize=8)
    return image


def _name_rows(axis: Axes, names: Sequence[str], *, num_training: int, is_cut: bool = True) -> None:
    """Names on the left, and a dotted line between training and evaluation. is_cut: white lines between other rows."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(visible=False)
    axis.tick_params(axis="y", length=0)
    axis.spines[:].set_visible(False)
    for row in range(1, len(names) if is_cut else 0):
        axis.axhline(row - 0.5, color="white", linewidth=1)
    if 0 < num_training < len(names):
        axis.axhline(num_training - 0.5, color=INK, linewidth=1.4, linestyle=(0, (1, 1.5)))
