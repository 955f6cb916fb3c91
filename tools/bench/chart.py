"""What a benchmark draws: ratios as bars, sweeps as lines. The looks are those of the reports' figures."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report import setting_line
from bench.sweeps import KINDS, SweepKind
from moe_lvlm.analysis.plots.style import BLUE, CHANCE, INK, ORANGE, VERMILION, panels, save, styled

# A bar this many times as long as the floor's ends the axis: beyond it the others could not be told apart.
_LONGEST = 3.0
_COLORS = {"fp32": BLUE, "bf16": ORANGE}


def bar_chart(result: dict[str, Any], path: Path) -> None:
    """Draw `variants` of a result: `ratio_to_dense` with its spread, a group of bars a type.

    A row needs `ratio_to_dense` and `spread`; `label` and `dtype`, where it has them, name its bar and its group. Rows
    of the same label stand together. A bar too long for the page is cut, and its number tells its length.
    """
    rows = [{"label": name, "dtype": ""} | row for name, row in result["variants"].items()]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    with styled():
        figure = Figure(figsize=(8.4, 1.2 + len(labels) * (0.14 + 0.22 * len(dtypes))), layout="constrained")
        axis = figure.subplots()
        longest = min(_LONGEST, 1.15 * max(row["ratio_to_dense"] for row in rows))
        for place, dtype in enumerate(dtypes):
            _bars(axis, [row for row in rows if row["dtype"] == dtype], labels, place, dtypes, longest)
        axis.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axis.set_xlim(0, longest * 1.12)
        axis.set_yticks(range(len(labels)), [textwrap.fill(label, 44) for label in labels])
        axis.set_ylim(len(labels) - 0.5, -0.5)  # the first at the top
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("time, dense floor = 1; whiskers: p10 to p90")
        figure.suptitle(setting_line(result), fontsize=8.5, x=0.01, ha="left")
        if len(dtypes) > 1:
            figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(dtypes))
    _write(figure, path)


def _bars(
    axis: Axes, rows: list[dict[str, Any]], labels: list[str], place: int, dtypes: list[str], longest: float
) -> None:
    """The bars of one type, the `place`-th of each label's group."""
    height = 0.8 / len(dtypes)
    for index, row in enumerate(rows):
        ratio, y = row["ratio_to_dense"], labels.index(row["label"]) + (place - (len(dtypes) - 1) / 2) * height
        half = row["spread"] * ratio / 2
        axis.barh(
            y,
            min(ratio, longest),
            height=height,
            color=_COLORS.get(row["dtype"], BLUE),
            xerr=half if ratio + half <= longest else None,
            error_kw={"ecolor": INK, "elinewidth": 0.8},
            label=row["dtype"] if index == 0 else None,
        )
        end = min(ratio + half, longest)
        axis.annotate(f"{ratio:.2f}", (end, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)


def sweep_chart(result: dict[str, Any], path: Path) -> None:
    """Draw `sweeps` of a result, a panel each: ours, the floor's own growth beside it, and the goal where there is one.

    sweeps: by name (`bench.sweeps.KINDS`), its points, each with value, ratio, spread, floor_ratio and goal.
    """
    sweeps = result["sweeps"]
    with styled():
        figure, axes = panels(len(sweeps), max_columns=3, width=3.9, height=3.1)
        for axis, (name, points) in zip(axes, sweeps.items(), strict=True):
            _sweep(axis, KINDS[name], points)
        handles = {label: one for axis in axes for one, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        figure.suptitle(setting_line(result), fontsize=8.5, x=0.01, ha="left")
    _write(figure, path)


def _sweep(axis: Axes, kind: SweepKind, points: list[dict[str, Any]]) -> None:
    values = [point["value"] for point in points]
    ratios = [point["ratio"] for point in points]
    halves = [point["spread"] * point["ratio"] / 2 for point in points]
    axis.errorbar(values, ratios, yerr=halves, color=BLUE, marker="o", markersize=4, capsize=2, label="moe_lvlm")
    floors = [(point["value"], point["floor_ratio"]) for point in points if point["floor_ratio"] is not None]
    if floors:
        axis.plot(
            *zip(*floors, strict=True), color=CHANCE, marker="s", markersize=3, label="dense FFN of as many FLOPs"
        )
    goals = [(point["value"], point["goal"]) for point in points if point["goal"] is not None]
    if goals:
        axis.plot(*zip(*goals, strict=True), color=VERMILION, linestyle=(0, (4, 3)), marker="_", label="goal (at most)")
    if kind.is_log:
        axis.set_xscale("log", base=2)
    axis.set_xticks(values, _tick_labels(values, is_log=kind.is_log))
    axis.minorticks_off()
    tops = [ratio + half for ratio, half in zip(ratios, halves, strict=True)]
    axis.set_ylim(0, 1.08 * max(*tops, *(goal for _, goal in goals), *(floor for _, floor in floors)))
    axis.set_title(kind.title)
    axis.set_xlabel(kind.axis)
    axis.set_ylabel(f"{kind.measure}, first = 1")


def _tick_labels(values: list[float], *, is_log: bool) -> list[str]:
    """A label a value, but none where it would run into the one before."""
    room = 0.0 if is_log else 0.07 * (max(values) - min(values))
    labels, last = [], -math.inf
    for value in values:
        has_room = value - last >= room
        labels.append(f"{value:g}" if has_room else "")
        last = value if has_room else last
    return labels


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
