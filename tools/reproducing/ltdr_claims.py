"""LTDR's claims as tables: the shape of the distributions, tail tokens and foreground, what DAR and EEA change, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from moe_lvlm.analysis.measures import MODALITIES, site_name
from moe_lvlm.analysis.statistics import NUM_BINS, Agreement, RoutingStatistics, SiteStatistics
from moe_lvlm.routing.types import Modality, Site
from reproducing.cost import Measure, cost_grid
from reproducing.grid import NOTHING, Grid, show_difference, show_number, show_spread
from reproducing.paper import Paper, Row, Table
from reproducing.results import Results, RunResult, expert_rows_per_token
from reproducing.scores import score_grids
from reproducing.shape import Shape, shape_of
from reproducing.spread import Values, difference, mean_of, spread

_NAMES = {Modality.LANGUAGE: "language", Modality.VISION: "vision"}
_BINS = 10
_BY_SEED = "mean over MoE layers, then mean ± sample standard deviation over seeds"


def claim_grids(
    paper: Paper, table: Table, results: Results, scale: str, timed: Callable[[Table], list[Grid]]
) -> list[Grid]:
    """Tables (a) to (e). timed: measures rows turn about."""
    return [
        _shape_grid(table, results),
        _bin_grid(table, results),
        _foreground_grid(table, results),
        _tail_head_grid(table, results),
        _load_grid(table, results),
        *score_grids(paper, table, results, scale, "(d) Scores"),
        expert_cost_grid("(e) Cost", table, results),
        *timed(paper.tables["table4"]),
    ]


def expert_cost_grid(title: str, table: Table, results: Results) -> Grid:
    """What a token and a run cost."""
    measures = [
        Measure(f"expert rows, {name}", partial(_expert_rows, modality=name), 2) for name in ("language", "vision")
    ]
    note = (
        "expert rows: routed experts that a token of the evaluation passes, mean over MoE layers; shared experts come "
        "on top, and a fine-grained expert is a part of a full one"
    )
    return cost_grid(title, table, results, measures, (note,))


def _expert_rows(one: RunResult, *, modality: str) -> float | None:
    return expert_rows_per_token(one.routing)[modality]


def _each(found: Sequence[RunResult | None], of: Callable[[RunResult], float | None]) -> Values:
    return [None if one is None else of(one) for one in found]


def _over_layers(found: Sequence[RunResult | None], of: Callable[[SiteStatistics], float | None]) -> Values:
    """Each seed's mean over MoE layers, None where one of them has no value."""
    return _each(
        found,
        lambda one: None if one.routing is None else mean_of([of(values) for _, values in one.routing.items()]),
    )


def _shape_grid(table: Table, results: Results) -> Grid:
    rows = []
    for row in table.rows:
        found = results.by_row[row.recipe]
        for place, modality in enumerate(MODALITIES):
            shapes = _shapes(found, place)
            mean = spread(_over_layers(found, partial(SiteStatistics.mean_rpv, modality=modality)))
            rows.append(
                (
                    f"{row.label}: {_NAMES[modality]}",
                    show_spread(mean, 4),
                    _mean_shape(shapes, lambda shape: shape.skewness),
                    _mean_shape(shapes, lambda shape: 100 * shape.below_mean, 1),
                    _mean_shape(shapes, lambda shape: shape.gini),
                    _mean_shape(shapes, lambda shape: 100 * shape.top_tenth, 1),
                )
            )
    columns = ("", "mean RPV", "skewness", "below the mean, %", "Gini", "largest tenth holds, %")
    notes = (
        _BY_SEED,
        "for comparison: a uniform distribution from 0 has 0, 50, 0.33, 19; an exponential one 2, 63.2, 0.50, 33",
        f"{NOTHING}: more than half of a layer's tokens fall into one of the histogram's 2000 bins",
    )
    return Grid("(a) Is the routing probability variance long-tailed?", columns, tuple(rows), notes)


def _shapes(found: Sequence[RunResult | None], row: int) -> list[list[Shape | None]]:
    """Of each seed that has routing statistics: the shape at each MoE layer, for the modality in this row."""
    return [
        [shape_of(values, row) for _, values in one.routing.items()]
        for one in found
        if one is not None and one.routing is not None
    ]


def _mean_shape(shapes: Sequence[Sequence[Shape | None]], of: Callable[[Shape], float], digits: int = 2) -> str:
    by_seed = [mean_of([None if shape is None else of(shape) for shape in layers]) for layers in shapes]
    return show_spread(spread(by_seed), digits)


def _bin_grid(table: Table, results: Results) -> Grid:
    """Shares of tokens in equal bins, the same for all rows, of which the last has no end."""
    width = _bin_width(results)
    rows = []
    for row in table.rows:
        for place, modality in enumerate(MODALITIES):
            shares = [
                _over_layers(results.by_row[row.recipe], partial(_share, row=place, width=width, step=step))
                for step in range(_BINS)
            ]
            rows.append((f"{row.label}: {_NAMES[modality]}", *(show_spread(spread(values)) for values in shares)))
    edges = next((v.edges for one in _with_routing(results) for _, v in one.items()), np.zeros(NUM_BINS + 1))
    starts = [f"{edges[min(step * width, NUM_BINS)]:.4f}" for step in range(_BINS)]
    notes = (_BY_SEED, "share of tokens in per cent, by RPV: from this value to the next")
    return Grid("(a) Tokens by routing probability variance", ("", *starts), tuple(rows), notes)


def _with_routing(results: Results) -> list[RoutingStatistics]:
    return [one.routing for row in results.by_row.values() for one in row if one and one.routing]


def _bin_width(results: Results) -> int:
    """Fine bins of a histogram that make one of the table's, so that 99.5 % of any row's tokens lie within them."""
    highest = 1
    for routing in _with_routing(results):
        for _, values in routing.items():
            for counts in values.histogram:
                if counts.sum():
                    highest = max(highest, int(np.searchsorted(np.cumsum(counts), 0.995 * counts.sum())) + 1)
    return math.ceil(highest / _BINS)


def _share(values: SiteStatistics, *, row: int, width: int, step: int) -> float | None:
    counts = values.histogram[row]
    part = counts[step * width : None if step == _BINS - 1 else (step + 1) * width]
    return 100 * float(part.sum()) / float(counts.sum()) if counts.sum() else None


def _foreground_grid(table: Table, results: Results) -> Grid:
    rows = []
    for row in table.rows:
        found = results.by_row[row.recipe]
        for site in _sites(found):
            agreements = [_agreement(one, site) for one in found]
            rows.append((f"{row.label}: layer {site_name(site)}", *_agreement_cells(agreements)))
    columns = (
        "", "precision, %", "chance", "recall, %", "chance", "AUC", "chance", "seeds above chance (AUC)",
    )  # fmt: skip
    notes = (
        "mean ± sample standard deviation over seeds",
        "precision: tail tokens that lie on the foreground, chance is its share of all tokens; recall: foreground tokens "
        "in the tail, chance is the tail's share; AUC: of RPV for the foreground, mean over images",
    )
    return Grid("(b) Are tail tokens the foreground?", columns, tuple(rows), notes)


def _sites(found: Sequence[RunResult | None]) -> list[Site]:
    return sorted({site for one in found if one and one.routing for site, _ in one.routing.items()})


def _agreement(one: RunResult | None, site: Site) -> Agreement | None:
    return None if one is None or one.routing is None else one.routing[site].foreground_agreement()


def _agreement_cells(found: Sequence[Agreement | None]) -> tuple[str, ...]:
    def over(of: Callable[[Agreement], float | None], scale: float, digits: int) -> str:
        values = [None if one is None or (value := of(one)) is None else scale * value for one in found]
        return show_spread(spread(values), digits)

    known = [one.auc for one in found if one is not None and one.auc is not None]
    return (
        over(lambda one: one.precision, 100, 1),
        over(lambda one: one.foreground_share, 100, 1),
        over(lambda one: one.recall, 100, 1),
        over(lambda one: one.tail_share, 100, 1),
        over(lambda one: one.auc, 1, 2),
        "0.50",
        f"{sum(auc > 0.5 for auc in known)}/{len(known)}",
    )


def _tail_head_grid(table: Table, results: Results) -> Grid:
    """Figure 5's means, and how they differ from the baseline's."""
    of = {"tail": lambda site: site.mean_tail_rpv, "head": lambda site: site.mean_head_rpv}
    rows = []
    for row in table.rows:
        cells = [row.label]
        for kind in of.values():
            cells.append(show_spread(spread(_over_layers(results.by_row[row.recipe], kind)), 4))
            cells.append(_to_baseline(row, results, kind))
        share = _over_layers(results.by_row[row.recipe], lambda site: site.tail_share)
        cells.append(show_spread(spread([None if value is None else 100 * value for value in share])))
        rows.append(tuple(cells))
    columns = ("", "tail", "to the baseline", "head", "to the baseline", "tail tokens, %")
    notes = (
        _BY_SEED,
        "tail: vision tokens above the mean RPV of their image; in brackets: seeds with that sign",
        "the paper: LTDR raises the tail's mean and leaves the head's; about 13 % of vision tokens are in the tail",
    )
    return Grid("(c) Mean RPV of vision tail and head tokens", columns, tuple(rows), notes)


def _to_baseline(row: Row, results: Results, of: Callable[[SiteStatistics], float | None]) -> str:
    if row.recipe == row.baseline:
        return NOTHING
    ours, theirs = (_over_layers(results.by_row[name], of) for name in (row.recipe, row.baseline))
    return show_difference(difference(ours, theirs), 4)


def _load_grid(table: Table, results: Results) -> Grid:
    """Figure 4 in one number a modality: the busiest expert's share of the assignments."""
    rows = []
    for row in table.rows:
        cells = [row.label]
        for place in range(len(MODALITIES)):

            def busiest(site: SiteStatistics, place: int = place) -> float | None:
                load = site.load[place]
                return 100 * float(load.max()) / float(load.sum()) if load.sum() else None

            cells.append(show_spread(spread(_over_layers(results.by_row[row.recipe], busiest))))
        even = next((100 / values.num_experts for one in results.by_row[row.recipe] if one and one.routing
                     for _, values in one.routing.items()), None)  # fmt: skip
        rows.append((*cells, show_number(even)))
    columns = ("", "language, %", "vision, %", "even load")
    notes = (_BY_SEED, "share of the assignments that a layer's busiest expert gets")
    return Grid("(c) How uneven is the load?", columns, tuple(rows), notes)
