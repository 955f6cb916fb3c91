"""Tables of scores: ours with their spread over seeds, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reproducing.grid import NOTHING, Grid, show_difference, show_number, show_spread
from reproducing.paper import Paper, Row, Table
from reproducing.results import Results
from reproducing.spread import Values, difference, mean_of, spread

TINY_NOTE = "tiny scale shows the direction of an effect at best, not the paper's numbers"
MEAN = "mean"  # over all tasks of the scenes, where the paper's averages have no counterpart
_PAIRED = "mean ± sample standard deviation of the differences seed by seed; in brackets: seeds with that sign"
# recipe -> one value a seed
ByRecipe = Mapping[str, Values]


@dataclass(frozen=True, slots=True)
class Scores:
    """What ours come to. columns: head -> recipe -> seeds; scores first, then averages. averaged: average's head -> recipe
    -> the heads of those that it is over."""

    columns: Mapping[str, ByRecipe]
    averaged: Mapping[str, Mapping[str, tuple[str, ...]]]


def score_grids(paper: Paper, table: Table, results: Results, scale: str, title: str | None = None) -> list[Grid]:
    """The table itself, and the differences to the baseline. title: in place of the table's heading."""
    found = collect(paper, table, results, scale)
    heading = title or table.heading
    if scale == "full":
        whole = _full_grid(paper, table, results, found, heading)
    else:
        whole = _tiny_grid(paper, table, results, found, heading)
    return [whole, _difference_grid(table, found, heading, paper.digits if scale == "full" else 1)]


def collect(paper: Paper, table: Table, results: Results, scale: str) -> Scores:
    """At full scale the paper's columns that any run of ours has; at tiny scale the scenes' tasks; and the averages."""
    if scale == "full":
        return _collect(table, _columns(paper, table, results), {head: (head,) for head in table.columns})
    tasks = {task: _by_recipe(table, results, f"{task}.accuracy") for task in results.tasks}
    if paper.tiny and table.averages:
        return _collect(table, tasks, paper.tiny)
    mean = {
        row.recipe: [None if one is None else one.mean_accuracy() for one in results.by_row[row.recipe]]
        for row in table.rows
    }
    return Scores({**tasks, MEAN: mean}, {MEAN: {row.recipe: tuple(tasks) for row in table.rows}})


def _by_recipe(table: Table, results: Results, key: str) -> dict[str, Values]:
    return {row.recipe: results.values(row.recipe, key) for row in table.rows}


def _columns(paper: Paper, table: Table, results: Results) -> dict[str, ByRecipe]:
    columns: dict[str, ByRecipe] = {}
    for head in table.columns:
        numbers = paper.scores.get(head, ())
        by_recipe = {
            row.recipe: [
                mean_of(seed) for seed in zip(*(results.values(row.recipe, key) for key in numbers), strict=True)
            ]
            for row in table.rows
        }
        if any(value is not None for values in by_recipe.values() for value in values):
            columns[head] = {**by_recipe}
    return columns


def _collect(table: Table, columns: Mapping[str, ByRecipe], stands_for: Mapping[str, tuple[str, ...]]) -> Scores:
    """With the table's averages over those of our columns that stand for some of the average's."""
    averaged = {
        head: {
            row.recipe: tuple(
                ours
                for ours in columns
                if any(name in names and (row.over is None or name in row.over) for name in stands_for.get(ours, ()))
            )
            for row in table.rows
        }
        for head, names in table.averages.items()
    }
    averages = {
        head: {recipe: _means(columns, recipe, over) for recipe, over in by_recipe.items()}
        for head, by_recipe in averaged.items()
        if all(by_recipe.values())
    }
    return Scores({**columns, **averages}, averaged)


def _means(columns: Mapping[str, ByRecipe], recipe: str, over: tuple[str, ...]) -> Values:
    """Of each seed, over some columns; None where one of them has no value."""
    return [mean_of(seed) for seed in zip(*(columns[head][recipe] for head in over), strict=True)]


def _tiny_grid(paper: Paper, table: Table, results: Results, found: Scores, heading: str) -> Grid:
    """Our tasks, their averages, and then all of the paper's columns."""
    has_paper = any(row.paper for row in table.rows)
    rows = tuple(
        (
            row.label,
            *(show_spread(spread(values[row.recipe])) for values in found.columns.values()),
            *(show_number(value, paper.digits) for value in row.paper),
        )
        for row in table.rows
    )
    notes = [TINY_NOTE, f"ours: {paper.unit}, {_seeds(results)}"]
    notes += [] if table.tiny_note is None else [table.tiny_note]
    printed = table.columns if has_paper else ()
    columns = ("", *(f"ours: {head}" for head in found.columns), *(f"paper: {head}" for head in printed))
    return Grid(heading, columns, rows, (*notes, *table.notes))


def _full_grid(paper: Paper, table: Table, results: Results, found: Scores, heading: str) -> Grid:
    """Ours and the paper's, side by side."""
    has_paper = any(row.paper for row in table.rows)
    rows = []
    for row in table.rows:
        cells = [row.label]
        for head, values in found.columns.items():
            cells.append(show_spread(spread(values[row.recipe]), paper.digits))
            if has_paper:
                cells.append(show_number(_printed(table, row, head, found), paper.digits))
        rows.append(tuple(cells))
    notes = [_seeds(results)]
    for head, names in table.averages.items():
        measured = [name for name in names if name in found.columns]
        if measured and len(measured) < len(names):
            notes.append(f"{head} is over {', '.join(measured)}, the paper's too")
    if missing := [head for head in table.columns if head not in found.columns]:
        notes.append(f"not measured here: {', '.join(missing)}")
    heads = [name for head in found.columns for name in ((f"{head} ours", "paper") if has_paper else (head,))]
    return Grid(heading, ("", *heads), tuple(rows), (*notes, *table.notes))


def _printed(table: Table, row: Row, head: str, found: Scores) -> float | None:
    """The paper's number; of an average that ours are not wholly measured for, its mean over the same columns."""
    printed = dict(zip(table.columns, row.paper, strict=True))
    if head not in table.averages:
        return printed[head]
    names = [name for name in table.averages[head] if row.over is None or name in row.over]
    measured = found.averaged[head][row.recipe]
    return printed[head] if set(names) == set(measured) else mean_of([printed[name] for name in measured])


def _difference_grid(table: Table, found: Scores, heading: str, digits: int) -> Grid:
    """Every row that is not its own baseline, column by column; of averages the paper's too."""
    by_recipe = {row.recipe: row for row in table.rows}
    averages = [head for head in table.averages if any(row.paper for row in table.rows)]
    rows = []
    for row in table.rows:
        if row.recipe == row.baseline:
            continue
        differences = [difference(values[row.recipe], values[row.baseline]) for values in found.columns.values()]
        cells = [row.label, *(show_difference(one, digits) for one in differences)]
        for head in averages:
            mine, theirs = (one.paper[table.columns.index(head)] for one in (row, by_recipe[row.baseline]))
            cells.append(NOTHING if mine is None or theirs is None else f"{mine - theirs:+.{digits}f}")
        rows.append(tuple(cells))
    columns = ("", *found.columns, *(f"paper: {head}" for head in averages))
    return Grid(f"{heading}: difference to the baseline", columns, tuple(rows), (_PAIRED,))


def _seeds(results: Results) -> str:
    plural = "s: mean ± sample standard deviation" if results.seeds > 1 else ""
    return f"{results.seeds} seed{plural}"
