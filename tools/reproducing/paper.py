"""The paper's tables and figures as data, read from paper.yaml; see there for what was printed where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PAPER = Path(__file__).with_name("paper.yaml")
ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a table. recipe: its name below recipes/ltdr/. baseline: the recipe that it is compared with.
    paper: what the paper prints, one value a column of the table; empty for a figure."""

    recipe: str
    label: str
    baseline: str
    paper: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table or figure. columns: the paper's; empty for a figure."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_tables(path: Path = PAPER) -> dict[str, Table]:
    """All tables and figures by name, in the file's order.

    Raises:
        ValueError: a row with another number of values than its table has columns, or without its baseline.
    """
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: _table(name, values, path) for name, values in data["tables"].items()}


def benchmark_scores(path: Path = PAPER) -> Mapping[str, tuple[str, ...]]:
    """Column of the paper -> the numbers of metrics.json, as `<task>.<number>`, whose mean it is."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {column: tuple(numbers) for column, numbers in data["benchmark_scores"].items()}


def _table(name: str, values: Mapping[str, Any], path: Path) -> Table:
    columns = tuple(values.get("columns", ()))
    rows = tuple(
        Row(
            recipe=row["recipe"],
            label=row["label"],
            baseline=row.get("baseline", values["baseline"]),
            paper=tuple(row.get("paper", ())),
        )
        for row in values["rows"]
    )
    recipes = {row.recipe for row in rows}
    for row in rows:
        if len(row.paper) != len(columns):
            raise ValueError(
                f"{path}: {name}: {row.recipe}: {len(row.paper)} values; allowed: {len(columns)}, one a column"
            )
        if row.baseline not in recipes:
            raise ValueError(
                f"{path}: {name}: {row.recipe}: baseline {row.baseline!r} is no row of the table; allowed: "
                f"{', '.join(sorted(recipes))}"
            )
    return Table(name=name, title=values["title"], columns=columns, rows=rows)


def choose(text: str, tables: Mapping[str, Table]) -> tuple[Table, ...]:
    """The tables that an argument means: `table3` or `3`, `figure1b` or `1b`, `claims`, `all`. A bare number that is
    a table's and a figure's (4, 5) means the table.

    Raises:
        ValueError: there is none of that name.
    """
    if text == ALL:
        return tuple(tables.values())
    for name in (text, f"table{text}", f"figure{text}"):
        if name in tables:
            return (tables[name],)
    raise ValueError(f"{text!r}: no such table; allowed: {', '.join(tables)}, {ALL}")


def keep_rows(table: Table, recipes: tuple[str, ...]) -> Table:
    """The table with some rows only, and their baselines, which differences are taken to.

    Raises:
        ValueError: a recipe without a row in the table.
    """
    known = [row.recipe for row in table.rows]
    if unknown := [name for name in recipes if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: not in {table.name}; allowed: {', '.join(known)}")
    wanted = set(recipes) | {row.baseline for row in table.rows if row.recipe in recipes}
    rows = tuple(row for row in table.rows if row.recipe in wanted)
    return Table(name=table.name, title=table.title, columns=table.columns, rows=rows)
