"""Figures of training: losses, and the load of experts over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lvlm.analysis.measures import site_of
from moe_lvlm.analysis.plots.style import (
    BLUE,
    CHANCE,
    ORANGE,
    expert_colors,
    panels,
    percent,
    smooth,
    spread,
    styled,
)
from moe_lvlm.routing.types import CONNECTOR, LANGUAGE_MODEL

Steps = Sequence[dict[str, Any]]

_MAX_LAYERS = 4


def loss_by_stage(steps: Steps) -> Figure:
    """Language-model loss over all stages, and below it the balance loss where there is one."""
    curves = [("language_loss", "Language-model loss (nats a token)", BLUE)]
    if any(step.get("balance_loss") is not None for step in steps):
        curves.append(("balance_loss", "Balance loss (as added)", ORANGE))
    with styled():
        figure, axes = panels(len(curves), max_columns=1, width=7.6, height=2.6, share_x=True)
        for axis, (key, title, color) in zip(axes, curves, strict=True):
            _curve(axis, steps, key, color)
            axis.set_title(title, pad=18 if axis is axes[0] else 6)
            _mark_stages(axis, steps, named=axis is axes[0])
        axes[0].set_ylim(bottom=0)
        axes[-1].set_xlabel("training step, all stages")
    return figure


def load_over_training(steps: Steps, *, part: str = LANGUAGE_MODEL) -> Figure | None:
    """Share of a modality's assignments that each expert gets, by step: one column a MoE layer of a part of the model.
    None without one, or where nothing passed it. In a connector all visual tokens of an image are assigned together."""
    routed = [step for step in steps if any(site_of(name).part == part for name in step.get("expert_load") or ())]
    if not routed:
        return None
    found = {name for step in routed for name in step["expert_load"] if site_of(name).part == part}
    layers = spread(sorted(found, key=site_of), _MAX_LAYERS)
    modalities = [kind for kind in ("language", "vision") if any(_row_sum(step, layers, kind) for step in routed)]
    if not modalities:
        return None
    with styled():
        figure = Figure(figsize=(1.4 + 2.5 * max(len(layers), 2), 2.3 * len(modalities) + 0.4), layout="constrained")
        grid = figure.subplots(len(modalities), len(layers), squeeze=False, sharex=True, sharey=True)
        num_experts = 0
        for row, kind in enumerate(modalities):
            for column, layer in enumerate(layers):
                axis = grid[row][column]
                num_experts = max(num_experts, _load_lines(axis, routed, layer, kind))
                axis.set_title(f"Layer {site_of(layer).layer}" if row == 0 else "")
            rows = "images" if part == CONNECTOR else f"{kind} tokens"
            grid[row][0].set_ylabel(f"{rows}\nshare of assignments")
            grid[row][0].yaxis.set_major_formatter(percent)
        for axis in grid[-1]:
            axis.set_xlabel("training step")
        # Only now: a limit set before the last line would cut it.
        grid[0][0].set_ylim(0, None)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(num_experts + 1, 9))
    return figure


def _curve(axis: Axes, steps: Steps, key: str, color: str) -> None:
    """Every step faint, the moving average strong; a stage's average never reaches into another stage."""
    for stage in _stage_names(steps):
        part = [step for step in steps if step["stage"] == stage]
        x = [step["global_step"] for step in part]
        y = np.array([np.nan if step.get(key) is None else step[key] for step in part], dtype=np.float64)
        axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(x, smooth(y, max(1, len(part) // 20)), color=color, linewidth=1.8)


def _mark_stages(axis: Axes, steps: Steps, *, named: bool) -> None:
    """A line before each stage's first step but the first, and the stage's name above its middle if `named`."""
    for index, stage in enumerate(_stage_names(steps)):
        numbers = [step["global_step"] for step in steps if step["stage"] == stage]
        if index:
            axis.axvline(numbers[0] - 0.5, color=CHANCE, linewidth=1, linestyle=(0, (4, 3)))
        if not named:
            continue
        middle = (numbers[0] + numbers[-1]) / 2
        axis.annotate(
            stage,
            (middle, 1),
            xycoords=axis.get_xaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color="#4A5058",
        )
    axis.set_xlim(steps[0]["global_step"] - 1, steps[-1]["global_step"] + 1)


def _load_lines(axis: Axes, routed: Steps, layer: str, kind: str) -> int:
    """Lines of all experts of a layer; the number of experts."""
    used = [step for step in routed if layer in step["expert_load"]]
    load = np.array([step["expert_load"][layer][kind] for step in used], dtype=np.float64)
    total = load.sum(axis=1, keepdims=True)
    share = np.divide(load, total, out=np.full_like(load, np.nan), where=total > 0)
    num_experts = load.shape[1]
    x = [step["global_step"] for step in used]
    window = max(1, len(used) // 20)
    for expert, color in enumerate(expert_colors(num_experts)):
        axis.plot(x, smooth(share[:, expert], window), color=color, linewidth=1.4, label=f"expert {expert}")
    axis.axhline(1 / num_experts, color=CHANCE, linewidth=1, linestyle=(0, (4, 3)), label="even load")
    return num_experts


def _row_sum(step: dict[str, Any], layers: Sequence[str], kind: str) -> int:
    return sum(sum(step["expert_load"][layer][kind]) for layer in layers if layer in step["expert_load"])


def _stage_names(steps: Steps) -> list[str]:
    return list(dict.fromkeys(step["stage"] for step in steps))
