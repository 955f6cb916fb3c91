"""What runs cost, and other numbers of runs as columns of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reproducing.grid import Grid, show_spread
from reproducing.paper import Table
from reproducing.results import Results, RunResult
from reproducing.spread import spread


@dataclass(frozen=True, slots=True)
class Measure:
    """A column: a number of each run, None where it has none, shown with its spread over seeds."""

    head: str
    of: Callable[[RunResult], float | None]
    digits: int = 1


def measure_grid(
    title: str, table: Table, results: Results, measures: Sequence[Measure], notes: Sequence[str] = ()
) -> Grid:
    """A row of the table a row, a measure a column."""
    rows = tuple(
        (
            row.label,
            *(
                show_spread(
                    spread([None if one is None else measure.of(one) for one in results.by_row[row.recipe]]),
                    measure.digits,
                )
                for measure in measures
            ),
        )
        for row in table.rows
    )
    return Grid(title, ("", *(measure.head for measure in measures)), rows, tuple(notes))


def cost_grid(
    title: str, table: Table, results: Results, measures: Sequence[Measure], notes: Sequence[str] = ()
) -> Grid:
    """Measures of what is computed, and the seconds of the last stage and of the evaluation."""
    found = [one for row in results.by_row.values() for one in row if one is not None]
    stage = next((list(one.train_seconds)[-1] for one in found if one.train_seconds), "last")
    seconds = (
        Measure(f"{stage} stage, s", lambda one: list(one.train_seconds.values())[-1] if one.train_seconds else None),
        Measure("evaluation, s", lambda one: one.eval_seconds),
    )
    beside = (
        f"seconds as the runs logged them, with up to {max((one.jobs for one in found), default=1)} runs beside each other "
        "on this machine: to be compared with care"
    )
    return measure_grid(title, table, results, (*measures, *seconds), (*notes, beside))
