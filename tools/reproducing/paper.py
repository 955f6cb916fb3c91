"""The papers' tables and figures as data, read from papers/<paper>.yaml; see there for what was printed where.

Keys of such a file:

* title, recipes: of the paper, and the folder of its rows' recipes.
* unit: what ours are at tiny scale. digits: decimals of scores (default: 1).
* scores: column -> numbers of metrics.json, as `<task>.<number>`, whose mean it is at full scale; `parameters` are those
  that are trained, in millions.
* averages: column -> the columns whose mean it is.
* tiny: task of the scenes -> columns that it stands for. Averages are then taken at tiny scale too; else the mean of all.
* tables: name -> title; kind (`scores`, the default, `timing`, `figure` or `claims`); columns; baseline; averages, in
  place of the paper's; notes, and tiny_note for the tiny scale alone; rows.
* rows: recipe; the paper's label; baseline, in place of the table's; paper: a value a column, null where the paper prints
  none; over: the columns that this row's averages are over (default: all of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

PAPERS = Path(__file__).with_name("papers")
DEFAULT = "ltdr"  # whose tables a bare name means
ALL = "all"
Kind = Literal["scores", "timing", "figure", "claims"]
Columns = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a table. recipe: its name in the paper's folder. baseline: the recipe that it is compared with.
    paper: what the paper prints, one value a column of the table; empty for a figure. over: the columns that its
    averages are over; None is all."""

    recipe: str
    label: str
    baseline: str
    paper: tuple[float | None, ...] = ()
    over: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table or figure. columns: the paper's; empty for a figure. averages: those of its columns that are means of
    others."""

    name: str
    title: str
    rows: tuple[Row, ...]
    kind: Kind = "scores"
    columns: tuple[str, ...] = ()
    averages: Columns = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tiny_note: str | None = None

    @property
    def heading(self) -> str:
        """`Table 3: ...`; the title alone of what has no number."""
        number = self.name.removeprefix("table")
        return self.title if number == self.name else f"Table {number}: {self.title}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """What a paper prints. scores: column -> the numbers of metrics.json whose mean it is at full scale. tiny: task of the
    scenes -> the columns that it stands for; empty where it stands for none."""

    name: str
    title: str
    recipes: str
    unit: str
    tables: Mapping[str, Table]
    scores: Columns
    tiny: Columns = field(default_factory=dict)
    digits: int = 1


def read_papers(folder: Path = PAPERS) -> dict[str, Paper]:
    """All papers by name, the one that bare names mean first."""
    names = sorted((path.stem for path in folder.glob("*.yaml")), key=lambda name: (name != DEFAULT, name))
    return {name: read_paper(name, folder) for name in names}


def read_paper(name: str, folder: Path = PAPERS) -> Paper:
    """A paper with its tables and figures in the file's order.

    Raises:
        ValueError: a row with another number of values than its table has columns, or without its baseline; a kind or a
            column that there is not.
    """
    path = folder / f"{name}.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    averages = _columns(data.get("averages", {}))
    return Paper(
        name=name,
        title=data["title"],
        recipes=data["recipes"],
        unit=data["unit"],
        tables={key: _table(key, values, averages, path) for key, values in data["tables"].items()},
        scores=_columns(data["scores"]),
        tiny=_columns(data.get("tiny", {})),
        digits=data.get("digits", 1),
    )


def _columns(values: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(names) for key, names in values.items()}


def _table(name: str, values: Mapping[str, Any], averages: Columns, path: Path) -> Table:
    columns = tuple(values.get("columns", ()))
    kind = values.get("kind", "scores")
    if kind not in get_args(Kind):
        raise ValueError(f"{path}: {name}: kind {kind!r}; allowed: {', '.join(get_args(Kind))}")
    rows = tuple(_row(row, values["baseline"]) for row in values["rows"])
    recipes = {row.recipe for row in rows}
    for row in rows:
        if len(row.paper) != len(columns) and (row.paper or kind == "scores"):
            raise ValueError(
                f"{path}: {name}: {row.recipe}: {len(row.paper)} values; allowed: {len(columns)}, one a column"
            )
        if row.baseline not in recipes:
            raise ValueError(
                f"{path}: {name}: {row.recipe}: baseline {row.baseline!r} is no row of the table; allowed: "
                f"{', '.join(sorted(recipes))}"
            )
        if unknown := [column for column in row.over or () if column not in columns]:
            raise ValueError(f"{path}: {name}: {row.recipe}: over: {', '.join(unknown)}; allowed: {', '.join(columns)}")
    used = _columns(values.get("averages", {})) or averages
    return Table(
        name=name,
        title=values["title"],
        rows=rows,
        kind=kind,
        columns=columns,
        averages={key: names for key, names in used.items() if key in columns},
        notes=tuple(values.get("notes", ())),
        tiny_note=values.get("tiny_note"),
    )


def _row(values: Mapping[str, Any], baseline: str) -> Row:
    over = values.get("over")
    return Row(
        recipe=values["recipe"],
        label=values["label"],
        baseline=values.get("baseline", baseline),
        paper=tuple(values.get("paper", ())),
        over=None if over is None else tuple(over),
    )


def choose(text: str, papers: Mapping[str, Paper]) -> tuple[Paper, tuple[Table, ...]]:
    """The paper and the tables that an argument means: `qmoe.table4` or `qmoe.4`, `ltdr.1b`, `qmoe.claims`, `qmoe.all`;
    without a paper LTDR's. A bare number that is a table's and a figure's (4, 5) means the table.

    Raises:
        ValueError: there is none of that name.
    """
    prefix, dot, rest = text.partition(".")
    name, wanted = (prefix, rest) if dot else (DEFAULT, text)
    if name not in papers:
        raise ValueError(f"{text!r}: no paper {name!r}; allowed: {', '.join(papers)}, before a dot and a table's name")
    paper = papers[name]
    if wanted == ALL:
        return paper, tuple(paper.tables.values())
    for known in (wanted, f"table{wanted}", f"figure{wanted}"):
        if known in paper.tables:
            return paper, (paper.tables[known],)
    raise ValueError(f"{text!r}: no such table; allowed: {', '.join(paper.tables)}, {ALL}")


def keep_rows(table: Table, recipes: tuple[str, ...]) -> Table:
    """The table with some rows only, and their baselines, which differences are taken to.

    Raises:
        ValueError: a recipe without a row in the table.
    """
    known = [row.recipe for row in table.rows]
    if unknown := [name for name in recipes if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: not in {table.name}; allowed: {', '.join(known)}")
    wanted = set(recipes) | {row.baseline for row in table.rows if row.recipe in recipes}
    return replace(table, rows=tuple(row for row in table.rows if row.recipe in wanted))
