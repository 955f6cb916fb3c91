"""Tail tokens drawn over example images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from moe_lvlm.analysis.examples import RoutingExample
from moe_lvlm.analysis.measures import site_name
from moe_lvlm.analysis.plots.style import SKY, VERMILION, spread, styled
from moe_lvlm.routing.types import Site

_MAX_EXAMPLES = 6
_MAX_LAYERS = 4


def tail_overlay(examples: Sequence[RoutingExample]) -> Figure | None:
    """Rows of examples: the image, then for up to four layers the image with its tail tokens. None without a tail map.

    What is not in the tail is dimmed; the foreground mask, where known, is outlined.
    """
    shown = spread([example for example in examples if example.tail], _MAX_EXAMPLES)
    if not shown:
        return None
    sites = spread(sorted({site for example in shown for site in example.tail}), _MAX_LAYERS)
    per_row = 1 + len(sites)
    blocks = 2 if per_row <= 3 and len(shown) > 1 else 1
    num_rows = math.ceil(len(shown) / blocks)
    # A narrow empty column between two examples of one row.
    widths = ([1.0] * per_row + [0.12]) * blocks
    with styled():
        figure = Figure(figsize=(1.75 * sum(widths[:-1]), 2.03 * num_rows + 0.3), layout="constrained")
        grid = figure.add_gridspec(num_rows, len(widths) - 1, width_ratios=widths[:-1])
        for number, example in enumerate(shown):
            row, block = divmod(number, blocks)
            first = block * (per_row + 1)
            axes = [figure.add_subplot(grid[row, first + column]) for column in range(per_row)]
            _draw_row(axes, example, sites)
        figure.legend(handles=_legend(shown), loc="outside lower center", ncols=2)
    return figure


def _draw_row(axes: Sequence[Axes], example: RoutingExample, sites: Sequence[Site]) -> None:
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.imshow(example.image, interpolation="nearest", extent=_extent(example), aspect=_aspect(example))
    axes[0].set_title(_shorten(example.question), fontsize=7.5, fontweight="normal", pad=3)
    axes[0].set_xlabel(_shorten(f"model: {example.prediction}"), fontsize=7.5, labelpad=2, loc="left")
    for axis, site in zip(axes[1:], sites, strict=True):
        axis.set_title(f"layer {site_name(site)}", fontsize=7.5, pad=3)
        if site in example.tail:
            _draw_tail(axis, example.tail[site].reshape(example.grid))
        if example.foreground is not None:
            _draw_outline(axis, example.foreground.reshape(example.grid) >= 0.5, color=SKY)


def _shorten(text: str) -> str:
    """One short line. A dollar sign would start a formula."""
    return textwrap.shorten(text, 28, placeholder=" …").replace("$", r"\$")


def _draw_tail(axis: Axes, tail: NDArray[np.bool_]) -> None:
    """Dim all patches outside the tail, outline the tail."""
    rest = [Rectangle((column, row), 1, 1) for row, column in zip(*np.nonzero(~tail), strict=True)]
    axis.add_collection(PatchCollection(rest, facecolor="white", edgecolor="none", alpha=0.68, antialiased=False))
    _draw_outline(axis, tail, color=VERMILION)


def _draw_outline(axis: Axes, cells: NDArray[np.bool_], *, color: str) -> None:
    """The border of a set of cells: each side that has a cell on one side only."""
    padded = np.pad(cells, 1)
    lines_x: list[float | None] = []
    lines_y: list[float | None] = []
    for row, column in zip(*np.nonzero(padded[1:] != padded[:-1]), strict=True):
        lines_x += [column - 1, column, None]
        lines_y += [row, row, None]
    for row, column in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True):
        lines_x += [column, column, None]
        lines_y += [row - 1, row, None]
    x = np.array([np.nan if value is None else value for value in lines_x], dtype=np.float64)
    y = np.array([np.nan if value is None else value for value in lines_y], dtype=np.float64)
    style = "-" if color == VERMILION else (0, (2.2, 1.4))
    axis.plot(x, y, color=color, linewidth=1.6, linestyle=style, clip_on=False, solid_capstyle="round")


def _extent(example: RoutingExample) -> tuple[float, float, float, float]:
    """The image in units of patches: cell (row, column) reaches from (column, row) to one more."""
    rows, columns = example.grid
    return (0, columns, rows, 0)


def _aspect(example: RoutingExample) -> float:
    """Keeps the image's own shape, also where patches are not square in it."""
    rows, columns = example.grid
    height, width = example.image.shape[:2]
    return (height / rows) / (width / columns)


def _legend(shown: Sequence[RoutingExample]) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = [Patch(facecolor="none", edgecolor=VERMILION, linewidth=1.6, label="tail tokens")]
    if any(example.foreground is not None for example in shown):
        handles.append(Line2D([], [], color=SKY, linestyle=(0, (2.2, 1.4)), linewidth=1.6, label="foreground mask"))
    return handles
