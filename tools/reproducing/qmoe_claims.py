"""Q-MoE's claims as tables: scores against the Q-Former with the same budget, what it costs, and whether paths follow
tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from moe_lvlm.analysis.paths import TaskInformation
from reproducing.cost import Measure, cost_grid, measure_grid
from reproducing.grid import NOTHING, Grid, show_difference, show_number
from reproducing.paper import Paper, Table
from reproducing.results import Results, RunResult
from reproducing.scores import collect, score_grids
from reproducing.spread import Values, difference


def claim_grids(
    paper: Paper, table: Table, results: Results, scale: str, timed: Callable[[Table], list[Grid]]
) -> list[Grid]:
    """Tables (a) to (d). timed: measures rows turn about."""
    return [
        score_grids(paper, table, results, scale, "(a) Scores")[0],
        _test_grid(paper, table, results, scale),
        cost_grid("(c) Cost", table, results, (Measure("trained, M", lambda one: one.parameters / 1e6, 3),)),
        *timed(table),
        _path_grid(table, results),
    ]


def _test_grid(paper: Paper, table: Table, results: Results, scale: str) -> Grid:
    """Every score of every row that has another row as its baseline."""
    rows = []
    for row in table.rows:
        if row.recipe == row.baseline:
            continue
        base = next(one.label for one in table.rows if one.recipe == row.baseline)
        for head, values in collect(paper, table, results, scale).columns.items():
            rows.append((f"{row.label} - {base}: {head}", *_test_cells(values[row.recipe], values[row.baseline])))
    columns = ("", "difference (seeds with that sign)", "sign test, p", "t test, p")
    least = 2 / 2**results.seeds
    notes = (
        "mean ± sample standard deviation of the differences seed by seed: both rows of a seed have the same starting "
        "point, data, order of data, steps and learning rate",
        f"both tests are two-sided and paired; the sign test cannot go below {least:.4g} with {results.seeds} seed(s), the "
        "t test takes differences to be normal; p is of one score by itself, with no allowance for there being several",
    )
    return Grid("(b) Does Q-MoE beat the Q-Former?", columns, tuple(rows), notes)


def _test_cells(values: Values, baseline: Values) -> tuple[str, ...]:
    found = difference(values, baseline)
    if found is None:
        return (NOTHING,) * 3
    return show_difference(found, 2), show_number(found.sign_p, 4), show_number(found.t_p, 4)


def _path_grid(table: Table, results: Results) -> Grid:
    """Of the rows with paths: how many there are, and what they tell of the task."""
    with_paths = [row for row in table.rows if any(one and one.paths for one in results.by_row[row.recipe])]
    measures = (
        Measure("paths taken", lambda one: None if one.paths is None else float(len(one.paths.overall()))),
        Measure("most frequent, %", _most_frequent),
        Measure("nats of the task", partial(_information, of=lambda one: one.measured), 3),
        Measure("by chance", partial(_information, of=lambda one: one.by_chance), 3),
        Measure("at most", partial(_information, of=lambda one: one.highest), 3),
        Measure("p of a permutation", partial(_information, of=lambda one: one.p_value), 4),
    )
    kept = Table(name=table.name, title=table.title, kind=table.kind, rows=tuple(with_paths))
    notes = (
        "of all images of the evaluation; most frequent: share of the images that take the most frequent path",
        "nats of the task: mutual information between path and task, by chance: where tasks are shuffled among images; at "
        "most: the entropy of the task",
    )
    return measure_grid("(d) Do paths follow tasks?", kept, results, measures, notes)


def _most_frequent(one: RunResult) -> float | None:
    if one.paths is None:
        return None
    counts = one.paths.overall()
    return 100 * max(counts.values()) / counts.total()


def _information(one: RunResult, *, of: Callable[[TaskInformation], float]) -> float | None:
    return None if one.paths is None else of(one.paths.task_information())
