"""Tables as plain text, as Markdown and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reproducing.spread import Difference, Spread

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Grid:
    """A title, column heads, rows of as many cells, and notes below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For a terminal: the first column to the left, numbers to the right."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.columns))]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        body = [_line(line, widths) for line in lines]
        return "\n".join([self.title, rule, body[0], rule, *body[1:], rule, *self.notes])

    def markdown(self) -> str:
        """A heading, a pipe table, notes."""
        marks = "|".join(["---", *["--:"] * (len(self.columns) - 1)])
        lines = [f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in (self.columns, *self.rows)]
        table = [lines[0], f"|{marks}|", *lines[1:]]
        return "\n".join([f"### {self.title}", "", *table, "", *(f"{note}\n" for note in self.notes)]).rstrip() + "\n"

    def to_json(self) -> dict[str, Any]:
        return {"title": self.title, "columns": self.columns, "rows": self.rows, "notes": self.notes}


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *rest = (
        cell.ljust(width) if place == 0 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def show_spread(value: Spread | None, digits: int = 1) -> str:
    """Mean +- sd, or the mean alone of a single seed."""
    if value is None:
        return NOTHING
    return f"{value.mean:.{digits}f}" + ("" if value.sd is None else f" ± {value.sd:.{digits}f}")


def show_difference(value: Difference | None, digits: int = 1) -> str:
    """Signed mean +- sd, and how many seeds agree in sign."""
    if value is None:
        return NOTHING
    sd = "" if value.sd is None else f" ± {value.sd:.{digits}f}"
    return f"{value.mean:+.{digits}f}{sd} ({value.agree}/{value.n})"


def show_number(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
