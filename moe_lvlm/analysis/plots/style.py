"""How all figures look. Figures are objects: nothing here touches matplotlib's global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from numpy.typing import NDArray

#: Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
LANGUAGE, VISION, CHANCE, INK, FAINT = BLUE, VERMILION, "#8A8F98", "#22262B", "#E4E7EB"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION)
#: Shares in heat maps: from almost the page's white to almost black.
SHARES = LinearSegmentedColormap.from_list("share", ["#F4F7FA", "#9CC9E6", BLUE, "#00304D"])

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9AA1AA",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": "#4A5058",
    "ytick.color": "#4A5058",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def styled() -> Any:
    """Context in which our settings hold. Both making and saving a figure belong in it."""
    return rc_context(_SETTINGS)


def panels(
    num_panels: int,
    *,
    max_columns: int,
    width: float,
    height: float,
    share_x: bool = False,
    share_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of equal panels, each `width` x `height` inches, and the axes of those in use."""
    columns = min(num_panels, max_columns)
    rows = math.ceil(num_panels / columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
    axes: list[Axes] = list(grid.flat)
    for unused in axes[num_panels:]:
        unused.remove()
    return figure, axes[:num_panels]


def expert_colors(num_experts: int) -> list[Any]:
    """A colour for each expert: the fixed cycle up to six, an even walk through a colour map above."""
    if num_experts <= len(CYCLE):
        return list(CYCLE[:num_experts])
    return [colormaps["turbo"](0.05 + 0.9 * index / (num_experts - 1)) for index in range(num_experts)]


def smooth(values: Sequence[float] | NDArray[np.floating], window: int) -> NDArray[np.float64]:
    """Centred moving average whose window shrinks at the ends. A missing value (nan) is left out of its window."""
    array = np.asarray(values, dtype=np.float64)
    half = window // 2
    result = np.full(array.shape, np.nan)
    for index in range(len(array)):
        part = array[max(0, index - half) : index + half + 1]
        known = part[~np.isnan(part)]
        if known.size:
            result[index] = known.mean()
    return result


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(index)] for index in np.linspace(0, len(items) - 1, limit)]


def label_shares(axis: Axes, bars: BarContainer, *, above: float) -> None:
    """Write the share of each bar into it, where there is room: `above` this share."""
    axis.bar_label(
        bars,
        fmt=lambda value: f"{value:.0%}" if value > above else "",
        label_type="center",
        color="white",
        fontsize=7,
    )


def percent(value: float, _position: float | None = None) -> str:
    """A share as an axis writes it: 0.125 -> 12.5%."""
    return f"{100 * value:g}%"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with styled():
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=160, format="png")
