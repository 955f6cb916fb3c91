"""The numbers of tools/reproduce.py: the paper's as they are kept, and what is counted over seeds, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

Import = Callable[[str], ModuleType]

# retyped from the paper
PRINTED = {
    ("table1", "ltdr_phi2", "MME"): 1440.8,
    ("table1", "moe_llava_qwen", "VQA-T"): 48.0,
    ("table3", "no_llb", "MME"): 1254.1,
    ("table3", "eea", "MM-Vet"): 28.5,
    ("table4", "moe_llava_stablelm", "training"): 24056,
    ("table4", "ltdr_stablelm", "Avg of inference"): 770,
    ("table5", "task", "POPE"): 81.5,
    ("table5", "stgc", "SQA"): 62.6,
    ("table6", "moe_llava_stablelm", "SQA"): 62.5,
    ("table6", "shared_1x1_12x025", "Avg"): 57.5,
    ("table7", "iat", "POPE"): 87.0,
    ("table7", "vht", "MME"): 1310.9,
    ("table11", "v4top2_t4top2", "VQA-T"): 46.8,
    ("table11", "v2top1_t2top1_dar_shared", "MMB"): 60.0,
    ("table12", "ltdr_stablelm", "popular F1"): 86.0,
    ("table12", "moe_llava_stablelm", "adversarial yes"): 41.7,
}


def test_numbers_are_the_paper_s(import_tool: Import) -> None:
    tables = import_tool("reproducing.paper").read_tables()
    for (name, recipe, column), value in PRINTED.items():
        row = next(row for row in tables[name].rows if row.recipe == recipe)
        assert row.paper[tables[name].columns.index(column)] == value, (name, recipe, column)


def test_averages_follow_from_the_rows(import_tool: Import) -> None:
    """A mistyped number would show: Avg is the mean of all columns but MME, to the paper's rounding."""
    columns = ("GQA", "SQA", "VQA-T", "POPE", "MMB", "MM-Vet")
    checked = 0
    for table in import_tool("reproducing.paper").read_tables().values():
        if "Avg" not in table.columns:
            continue
        for row in table.rows:
            values = dict(zip(table.columns, row.paper, strict=True))
            if row.recipe in ("vht", "moe_llava_stablelm") and table.name == "table6":
                continue
            assert sum(values[name] for name in columns) / 6 == pytest.approx(values["Avg"], abs=0.15), row
            checked += 1
    assert checked > 25


def test_spreads_by_hand(import_tool: Import) -> None:
    spread = import_tool("reproducing.spread")
    found = spread.spread([1.0, 2.0, None, 6.0])
    assert (found.mean, found.n) == (3.0, 3)
    assert found.sd == pytest.approx(math.sqrt((4 + 1 + 9) / 2))  # sample standard deviation
    assert spread.spread([5.0]).sd is None
    assert spread.spread([None]) is None
    assert spread.mean_of([1.0, 2.0]) == 1.5
    assert spread.mean_of([1.0, None]) is None


def test_differences_are_paired(import_tool: Import) -> None:
    spread = import_tool("reproducing.spread")
    # 1, 3, -1; the last seed has no baseline
    found = spread.difference([11.0, 23.0, 29.0, 40.0], [10.0, 20.0, 30.0, None])
    assert (found.mean, found.sd, found.n, found.agree) == (1.0, 2.0, 3, 2)
    assert spread.difference([1.0, 1.0], [1.0, 1.0]).agree == 0
    assert spread.difference([None], [1.0]) is None
    with pytest.raises(ValueError, match="zip"):
        spread.difference([1.0], [1.0, 2.0])


def test_cells(import_tool: Import) -> None:
    spread, grid = import_tool("reproducing.spread"), import_tool("reproducing.grid")
    assert grid.show_spread(spread.Spread(61.25, 0.5, 3)) == "61.2 ± 0.5"
    assert grid.show_spread(spread.Spread(61.25, None, 1), 2) == "61.25"
    assert grid.show_spread(None) == "-"
    assert grid.show_difference(spread.Difference(-1.0, 2.0, 3, 2)) == "-1.0 ± 2.0 (2/3)"
    made = grid.Grid("Title", ("", "a|b"), (("row", "1.0"), ("longer row", "-")), ("a note",))
    assert made.text().splitlines() == [
        "Title", "---------------", "            a|b", "---------------", "row         1.0", "longer row    -",
        "---------------", "a note",
    ]  # fmt: skip
    assert made.markdown() == "### Title\n\n|  | a\\|b |\n|---|--:|\n| row | 1.0 |\n| longer row | - |\n\na note\n"


def test_shapes_of_known_distributions(import_tool: Import) -> None:
    """Moments, Gini coefficients and Lorenz curves of the uniform and the exponential distribution, from textbooks."""
    shape = import_tool("reproducing.shape")
    centres = (np.arange(20_000) + 0.5) / 1000
    uniform = shape.histogram_shape((np.arange(20_000) < 10_000).astype(np.int64), centres)
    assert uniform.skewness == pytest.approx(0, abs=1e-6)
    assert uniform.below_mean == pytest.approx(0.5, abs=1e-3)
    assert uniform.gini == pytest.approx(1 / 3, abs=1e-3)
    assert uniform.top_tenth == pytest.approx(1 - 0.9**2, abs=1e-3)
    falling = shape.histogram_shape((1e9 * np.exp(-centres)).astype(np.int64), centres)
    assert falling.skewness == pytest.approx(2, abs=1e-2)
    assert falling.below_mean == pytest.approx(1 - math.exp(-1), abs=1e-3)
    assert falling.gini == pytest.approx(0.5, abs=1e-3)
    assert falling.top_tenth == pytest.approx(0.1 * (1 + math.log(10)), abs=1e-3)


def test_benchmarks_are_means_of_numbers(import_tool: Import) -> None:
    """POPE is the mean F1 of its three splits; Avg is over what there is, for both."""
    results, paper, scores = (import_tool(f"reproducing.{name}") for name in ("results", "paper", "scores"))
    table = paper.keep_rows(paper.read_tables()["table3"], ("dar",))
    splits = [f"pope_{name}.f1" for name in ("adversarial", "popular", "random")]

    def result(name: str, gqa: float, f1: tuple[float, ...]) -> Any:
        return results.RunResult(
            name=name, folder="", seed=0, scores={"gqa.accuracy": gqa, **dict(zip(splits, f1, strict=True))},
            train_seconds={}, eval_seconds=1.0, jobs=1, environment=None, routing=None,
        )  # fmt: skip

    found = results.Results(
        1, {"moe_llava_stablelm": [result("a", 60.0, (80, 85, 90))], "dar": [result("b", 62.0, (81, 86, 91))]}
    )
    grid = scores.score_grids(table, found, "full", paper.benchmark_scores())[0]
    assert grid.columns == ("", "GQA ours", "paper", "POPE ours", "paper", "Avg ours", "paper")
    assert grid.rows[1] == ("+ DAR", "62.0", "61.1", "86.0", "86.6", "74.0", "73.8")  # (61.1 + 86.6) / 2 = 73.85
    assert "not measured here: SQA, VQA-T, MME, MMB, MM-Vet" in grid.notes
