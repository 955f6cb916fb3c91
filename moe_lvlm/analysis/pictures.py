"""Figures as a report's page shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from moe_lvlm.analysis import plots


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure in the page. text: one sentence on how to read it."""

    file: str
    title: str
    text: str


def saved_picture(figure: Figure | None, report: Path, name: str, title: str, text: str) -> list[Picture]:
    """The figure saved, or nothing where there is none."""
    if figure is None:
        return []
    plots.save(figure, report / f"{name}.png")
    return [Picture(f"{name}.png", title, text)]
