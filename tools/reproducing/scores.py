"""Tables of scores: ours with their spread over seeds, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping

from reproducing.grid import NOTHING, Grid, show_difference, show_number, show_spread
from reproducing.paper import Table
from reproducing.results import MEAN, Results
from reproducing.spread import Values, difference, mean_of, spread

TINY_NOTE = "tiny scale shows the direction of an effect at best, not the paper's numbers"
_AVERAGE = "Avg"
_NOT_IN_AVERAGE = "MME"
# head of a column -> recipe -> one value a seed
Columns = Mapping[str, Mapping[str, Values]]


def score_grids(table: Table, results: Results, scale: str, benchmarks: Mapping[str, tuple[str, ...]]) -> list[Grid]:
    """The table itself, and the differences to the baseline."""
    if scale == "full":
        ours = _benchmarks(table, results, benchmarks)
        return [_benchmark_grid(table, results, ours), _difference_grid(table, ours)]
    ours = {task: _by_recipe(table, results, f"{task}.accuracy") for task in results.tasks}
    ours[MEAN] = _by_recipe(table, results, MEAN)
    return [_scene_grid(table, results, ours), _difference_grid(table, ours)]


def _by_recipe(table: Table, results: Results, key: str) -> dict[str, Values]:
    return {row.recipe: results.values(row.recipe, key) for row in table.rows}


def _scene_grid(table: Table, results: Results, ours: Columns) -> Grid:
    """Our tasks, their mean, and then all of the paper's columns."""
    rows = tuple(
        (
            row.label,
            *(show_spread(spread(values[row.recipe])) for values in ours.values()),
            *(show_number(value) for value in row.paper),
        )
        for row in table.rows
    )
    notes = [TINY_NOTE, f"ours: accuracy in per cent on held-out scenes, {_seeds(results)}"]
    if table.name == "table12":
        notes.append("the scenes ask no yes/no question, so POPE's splits have no counterpart here: the scenes' scores")
    columns = ("", *(f"ours: {head}" for head in ours), *(f"paper: {head}" for head in table.columns))
    return Grid(_title(table), columns, rows, tuple(notes))


def _benchmarks(
    table: Table, results: Results, benchmarks: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, Values]]:
    """The paper's columns that any run of ours has, and the average over those of them that the paper averages."""
    columns: dict[str, dict[str, Values]] = {}
    for head in table.columns:
        numbers = benchmarks.get(head, ())
        by_recipe = {
            row.recipe: [
                mean_of(seed) for seed in zip(*(results.values(row.recipe, key) for key in numbers), strict=True)
            ]
            for row in table.rows
        }
        if any(value is not None for values in by_recipe.values() for value in values):
            columns[head] = {**by_recipe}
    averaged = _averaged(table, columns)
    if averaged:
        columns[_AVERAGE] = {
            row.recipe: [mean_of(seed) for seed in zip(*(columns[head][row.recipe] for head in averaged), strict=True)]
            for row in table.rows
        }
    return columns


def _averaged(table: Table, columns: Columns) -> list[str]:
    """Columns that count in the average; none where the paper's table has no average."""
    return [head for head in columns if head not in (_AVERAGE, _NOT_IN_AVERAGE)] if _AVERAGE in table.columns else []


def _benchmark_grid(table: Table, results: Results, ours: Columns) -> Grid:
    """Ours and the paper's, side by side; the paper's average is over the same columns as ours."""
    rows = []
    averaged = _averaged(table, ours)
    for row in table.rows:
        printed = dict(zip(table.columns, row.paper, strict=True))
        printed[_AVERAGE] = mean_of([printed[head] for head in averaged])
        cells = [(show_spread(spread(values[row.recipe])), show_number(printed[head])) for head, values in ours.items()]
        rows.append((row.label, *(cell for pair in cells for cell in pair)))
    notes = [_seeds(results)]
    if averaged:
        notes.append(f"{_AVERAGE} is over {', '.join(averaged)}, the paper's too")
    if missing := [head for head in table.columns if head not in ours and head != _AVERAGE]:
        notes.append(f"not measured here: {', '.join(missing)}")
    heads = [head for name in ours for head in (f"{name} ours", "paper")]
    return Grid(_title(table), ("", *heads), tuple(rows), tuple(notes))


def _difference_grid(table: Table, ours: Columns) -> Grid:
    """Every row that is not its own baseline, column by column."""
    paper = {row.recipe: dict(zip(table.columns, row.paper, strict=True)) for row in table.rows}
    rows = []
    for row in table.rows:
        if row.recipe == row.baseline:
            continue
        found = [difference(values[row.recipe], values[row.baseline]) for values in ours.values()]
        cells = [row.label, *map(show_difference, found)]
        if _AVERAGE in table.columns:
            mine, theirs = paper[row.recipe][_AVERAGE], paper[row.baseline][_AVERAGE]
            cells.append(NOTHING if mine is None or theirs is None else f"{mine - theirs:+.1f}")
        rows.append(tuple(cells))
    columns = ("", *ours, *(("paper: Avg",) if _AVERAGE in table.columns else ()))
    notes = ("mean ± sample standard deviation of the differences seed by seed; in brackets: seeds with that sign",)
    return Grid(f"{_title(table)}: difference to the baseline", columns, tuple(rows), notes)


def _title(table: Table) -> str:
    if not table.name.startswith("table"):
        return "(d) Scores"
    return f"Table {table.name.removeprefix('table')}: {table.title}"


def _seeds(results: Results) -> str:
    plural = "s: mean ± sample standard deviation" if results.seeds > 1 else ""
    return f"{results.seeds} seed{plural}"
