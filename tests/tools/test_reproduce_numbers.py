"""The numbers of tools/reproduce.py: the papers' as they are kept, and what is counted over seeds, by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moe_lvlm.analysis.paths import PathStatistics

Import = Callable[[str], ModuleType]

# retyped from the papers
PRINTED = {
    ("ltdr", "table1", "ltdr_phi2", "MME"): 1440.8,
    ("ltdr", "table1", "moe_llava_qwen", "VQA-T"): 48.0,
    ("ltdr", "table3", "no_llb", "MME"): 1254.1,
    ("ltdr", "table3", "eea", "MM-Vet"): 28.5,
    ("ltdr", "table4", "moe_llava_stablelm", "training"): 24056,
    ("ltdr", "table4", "ltdr_stablelm", "Avg of inference"): 770,
    ("ltdr", "table5", "task", "POPE"): 81.5,
    ("ltdr", "table5", "stgc", "SQA"): 62.6,
    ("ltdr", "table6", "moe_llava_stablelm", "SQA"): 62.5,
    ("ltdr", "table6", "shared_1x1_12x025", "Avg"): 57.5,
    ("ltdr", "table7", "iat", "POPE"): 87.0,
    ("ltdr", "table7", "vht", "MME"): 1310.9,
    ("ltdr", "table11", "v4top2_t4top2", "VQA-T"): 46.8,
    ("ltdr", "table11", "v2top1_t2top1_dar_shared", "MMB"): 60.0,
    ("ltdr", "table12", "ltdr_stablelm", "popular F1"): 86.0,
    ("ltdr", "table12", "moe_llava_stablelm", "adversarial yes"): 41.7,
    ("mocle", "table2", "instructblip", "MME"): 1202.9,
    ("mocle", "table2", "instructblip_mocle", "A-OKVQA MC"): 78.2,
    ("mocle", "table2", "instructblip_mocle", "VQAv2"): 78.9,
    ("mocle", "table3", "instructblip", "SQA"): 62.0,
    ("mocle", "table3", "instructblip_mocle", "iVQA"): 53.2,
    ("mocle", "table4", "llava_lora_665k", "MMB"): 65.89,
    ("mocle", "table4", "llava_lora_med", "SLAKE Closed"): 85.58,
    ("mocle", "table4", "llava_lora", "VQA-RAD Open"): 46.89,
    ("mocle", "table4", "llava_mocle", "PathVQA Closed"): 91.65,
    ("mocle", "table5", "lora_r8", "#Param, M"): 4.19,
    ("mocle", "table5", "lora_r64", "SQA"): 62.0,
    ("mocle", "table5", "instructblip_mocle", "Avg."): 63.3,
    ("mocle", "table6", "top2", "VSR"): 56.3,
    ("mocle", "table7", "gating_token", "VQA-T"): 46.6,
    ("mocle", "table7", "gating_sentence", "Flickr"): 82.0,
    ("mocle", "table7", "gating_dataset", "IQA"): 45.9,
    ("mocle", "table7", "no_universal", "Avg."): 61.8,
    ("qmoe", "table1", "qformer_flan_t5", "AOKVQA"): 76.68,
    ("qmoe", "table1", "qmoe_flan_t5", "Average"): 84.95,
    ("qmoe", "table1", "qformer_vicuna", "VQA"): 68.34,
    ("qmoe", "table1", "qmoe_vicuna", "TextCaps"): 108.08,
    ("qmoe", "table2", "qformer_vicuna", "HM"): 52.60,
    ("qmoe", "table2", "qmoe_vicuna", "NoCaps"): 104.54,
    ("qmoe", "table3", "post", "COCO"): 139.137,
    ("qmoe", "table3", "greedy", "OKVQA"): 57.750,
    ("qmoe", "table3", "greedy", "Caption"): 123.243,
    ("qmoe", "table4", "pre", "TextCaps"): 106.381,
    ("qmoe", "table4", "cls", "Caption"): 123.12,
    ("qmoe", "table4", "post", "Average"): 87.17,
    ("qmoe", "table5", "experts_3", "Average"): 87.18,
    ("qmoe", "table5", "experts_2_1", "Caption"): 124.17,
    ("qmoe", "table5", "experts_4", "AOKVQA"): 72.926,
    ("qmoe", "table5", "experts_7_1", "#Param, M"): 387,
    ("qmoe", "table6", "mix_vqa_qmoe", "Average"): 67.31,
    ("qmoe", "table6", "mix_aokvqa_qformer", "VQA"): 66.83,
    ("qmoe", "table6", "mix_aokvqa_qmoe", "VQA"): None,
    ("qmoe", "table6", "mix_coco_qmoe", "COCO"): 139.14,
}


def test_numbers_are_the_papers(import_tool: Import) -> None:
    papers = import_tool("reproducing.paper").read_papers()
    for (paper, name, recipe, column), value in PRINTED.items():
        table = papers[paper].tables[name]
        row = next(row for row in table.rows if row.recipe == recipe)
        assert row.paper[table.columns.index(column)] == value, (paper, name, recipe, column)


# LTDR's and MoCLE's averages are rounded from unrounded scores; Q-MoE's have two decimals.
ROUNDING = {"ltdr": 0.15, "mocle": 0.1, "qmoe": 0.055}
# Rows whose averages do not follow from their scores, as the papers print them.
MISPRINTS = {
    ("ltdr", "table6", "vht"),
    ("ltdr", "table6", "moe_llava_stablelm"),
    ("qmoe", "table4", "pre"),
    ("qmoe", "table4", "cls"),
    ("qmoe", "table6", "qformer_vicuna"),
    ("qmoe", "table6", "mix_coco_qmoe"),
}


@pytest.mark.parametrize(("paper", "at_least"), [("ltdr", 25), ("mocle", 12), ("qmoe", 45)])
def test_averages_follow_from_the_rows(import_tool: Import, paper: str, at_least: int) -> None:
    """A mistyped number would show: an average is the mean of its columns, to the paper's rounding."""
    over = {
        "Avg": ("GQA", "SQA", "VQA-T", "POPE", "MMB", "MM-Vet"),
        "Avg.": ("Flickr", "HM", "SQA", "IQA", "VSR", "VQA-T"),
        "VQA": ("GQA", "OKVQA", "VQAv2", "AOKVQA"),
        "Caption": ("COCO", "TextCaps"),
        "Average": ("GQA", "OKVQA", "VQAv2", "AOKVQA", "COCO", "TextCaps"),
    }
    checked = 0
    for table in import_tool("reproducing.paper").read_paper(paper).tables.values():
        for row in table.rows:
            values = dict(zip(table.columns, row.paper, strict=bool(row.paper)))
            if (paper, table.name, row.recipe) in MISPRINTS:
                continue
            for head, columns in over.items():
                trained = [name for name in columns if row.over is None or name in row.over]
                if (table.name, head) == ("table6", "VQA"):
                    trained = ["GQA", "OKVQA", "VQAv2"]
                known = [value for name in trained if (value := values.get(name)) is not None]
                if values.get(head) is None or len(known) < len(trained):
                    continue
                assert sum(known) / len(known) == pytest.approx(values[head], abs=ROUNDING[paper]), (row, head)
                checked += 1
    assert checked > at_least


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


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0, 4.0, -1.0], [0.5, -0.2], [-3.0, 1.0, -2.0, -2.5, -1.0, -4.0, 0.1]])
def test_paired_tests_are_scipys(import_tool: Import, values: list[float]) -> None:
    spread = import_tool("reproducing.spread")
    baseline = [float(place) for place in range(len(values))]
    ours = [value + base for value, base in zip(values, baseline, strict=True)]
    found = spread.difference(ours, baseline)
    assert found.t_p == pytest.approx(stats.ttest_rel(ours, baseline).pvalue)
    positive = sum(value > 0 for value in values)
    assert found.sign_p == pytest.approx(stats.binomtest(positive, len(values)).pvalue)


def test_paired_tests_by_hand(import_tool: Import) -> None:
    spread = import_tool("reproducing.spread")
    five = spread.difference([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5)
    assert five.sign_p == 2 / 32
    # ties are left out of the sign test
    tied = spread.difference([1.0, 2.0, 3.0, 0.0], [0.0] * 4)
    assert (tied.n, tied.agree, tied.ties, tied.sign_p) == (4, 3, 1, 0.25)
    assert spread.difference([1.0, 1.0], [1.0, 1.0]).sign_p is None
    # nothing to be said of one seed, or of differences without a spread
    assert spread.difference([2.0], [1.0]).t_p is None
    assert spread.difference([2.0, 2.0], [1.0, 1.0]).t_p is None
    # a table's 5 % points
    assert spread.student_p(12.706, 1) == pytest.approx(0.05, abs=1e-5)
    assert spread.student_p(-2.776, 4) == pytest.approx(0.05, abs=1e-4)


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
    ltdr = paper.read_paper("ltdr")
    table = paper.keep_rows(ltdr.tables["table3"], ("dar",))
    splits = [f"pope_{name}.f1" for name in ("adversarial", "popular", "random")]

    def result(name: str, gqa: float, f1: tuple[float, ...]) -> Any:
        return results.RunResult(
            name=name, folder="", seed=0, scores={"gqa.accuracy": gqa, **dict(zip(splits, f1, strict=True))},
            parameters=1, train_seconds={}, eval_seconds=1.0, jobs=1, environment=None, routing=None,
        )  # fmt: skip

    found = results.Results(
        1, {"moe_llava_stablelm": [result("a", 60.0, (80, 85, 90))], "dar": [result("b", 62.0, (81, 86, 91))]}
    )
    grid = scores.score_grids(ltdr, table, found, "full")[0]
    assert grid.columns == ("", "GQA ours", "paper", "POPE ours", "paper", "Avg ours", "paper")
    assert grid.rows[1] == ("+ DAR", "62.0", "61.1", "86.0", "86.6", "74.0", "73.8")  # (61.1 + 86.6) / 2 = 73.85
    assert "not measured here: SQA, VQA-T, MME, MMB, MM-Vet" in grid.notes


def result(import_tool: Import, *, parameters: int = 1, paths: Any = None, **scores: Any) -> Any:
    """A run with these accuracies by task."""
    return import_tool("reproducing.results").RunResult(
        name="", folder="", seed=0, scores={f"{task}.accuracy": value for task, value in scores.items()},
        parameters=parameters, train_seconds={"tune": 100.0}, eval_seconds=10.0, jobs=2, environment=None, routing=None,
        paths=paths,
    )  # fmt: skip


def grids_of(import_tool: Import, table: str, scale: str, **found: list[Any]) -> list[Any]:
    """Scores of a table of the Q-MoE paper, of the rows that are given."""
    results, module, scores = (import_tool(f"reproducing.{name}") for name in ("results", "paper", "scores"))
    paper = module.read_paper("qmoe")
    kept = module.keep_rows(paper.tables[table], tuple(found))
    seeds = len(next(iter(found.values())))
    return list(scores.score_grids(paper, kept, results.Results(seeds, found), scale))


def test_a_fully_measured_average_is_the_paper_s_own(import_tool: Import) -> None:
    sets: dict[str, Any] = {"gqa": 60, "okvqa": 50, "vqav2": 70, "aokvqa": 80, "coco": 130, "textcaps": 110}
    more = sets | {"gqa": 62, "textcaps": 116}
    whole, differences = grids_of(
        import_tool, "table5", "full",
        qformer_vicuna=[result(import_tool, parameters=188_830_000, **sets)],
        experts_3=[result(import_tool, parameters=245_520_000, **more)],
    )  # fmt: skip
    assert whole.columns == (
        "", "#Param, M ours", "paper", "GQA ours", "paper", "OKVQA ours", "paper", "VQAv2 ours", "paper", "AOKVQA ours",
        "paper", "COCO ours", "paper", "TextCaps ours", "paper", "VQA ours", "paper", "Caption ours", "paper",
        "Average ours", "paper",
    )  # fmt: skip
    assert whole.rows[0][:5] == ("1", "188.83", "188.00", "60.00", "62.47")
    # (60 + 50 + 70 + 80) / 4, (130 + 110) / 2, 500 / 6
    assert whole.rows[0][-6:] == ("65.00", "68.34", "120.00", "122.60", "83.33", "86.43")
    assert whole.rows[1][-6:] == ("65.50", "69.03", "123.00", "123.48", "84.67", "87.18")
    assert differences.columns[-6:] == ("VQA", "Caption", "Average", "paper: VQA", "paper: Caption", "paper: Average")
    assert differences.rows[0][-6:] == ("+0.50 (1/1)", "+3.00 (1/1)", "+1.33 (1/1)", "+0.69", "+0.88", "+0.75")


def test_what_is_not_measured_leaves_averages_of_both(import_tool: Import) -> None:
    """Without captions; TextCaps alone stands in for the captions."""
    sets: dict[str, Any] = {"gqa": 60, "okvqa": 50, "textcaps": 110}
    [whole, _] = grids_of(import_tool, "table1", "full", qformer_vicuna=[result(import_tool, **sets)])
    assert whole.columns[-4:] == ("VQA ours", "paper", "Average ours", "paper")
    # the paper's GQA and OKVQA, 62.46 and 57.52, and TextCaps, 106.61
    assert whole.rows[0][-4:] == ("55.00", "59.99", "73.33", "75.53")
    assert "VQA is over GQA, OKVQA, the paper's too" in whole.notes
    assert "not measured here: VQAv2, AOKVQA, COCO" in whole.notes


def test_averages_are_over_what_a_row_is_trained_on(import_tool: Import) -> None:
    """Table 6: the connector that saw questions alone is scored on captions too, but not in its average."""
    sets: dict[str, Any] = {"gqa": 60, "okvqa": 50, "vqav2": 70, "aokvqa": 80, "coco": 13, "textcaps": 11}
    base = [result(import_tool, **sets)]
    whole, differences = grids_of(
        import_tool, "table6", "full", mix_vqa_qformer=base, mix_vqa_qmoe=[result(import_tool, **sets | {"gqa": 66})],
    )  # fmt: skip
    assert whole.rows[0][-4:] == ("60.00", "65.67", "60.00", "65.67")
    assert whole.rows[1][-4:] == ("62.00", "67.31", "62.00", "67.31")
    assert differences.rows[0][-2:] == ("+1.64", "+1.64")
    [whole, _] = grids_of(import_tool, "table6", "full", mix_aokvqa_qformer=base)
    assert whole.rows[0][-4:] == ("60.00", "66.83", "65.00", "68.24")

    scenes: dict[str, Any] = {"vqa": 60.0, "choice": 80.0, "caption": 100.0, "ocr": 20.0}
    whole, _ = grids_of(
        import_tool, "table6", "tiny",
        mix_aokvqa_qformer=[result(import_tool, **scenes)], qformer_vicuna=[result(import_tool, **scenes)],
    )  # fmt: skip
    heads = ("ours: vqa", "ours: choice", "ours: caption", "ours: ocr", "ours: VQA", "ours: Average")
    assert whole.columns[1:7] == heads
    assert [row[:7] for row in whole.rows] == [
        ("+ AOKVQA: Q-Former", "60.0", "80.0", "100.0", "20.0", "60.0", "70.0"),
        ("+ TextCaps: Q-Former", "60.0", "80.0", "100.0", "20.0", "60.0", "65.0"),
    ]


def test_tiny_tasks_stand_for_the_paper_s_sets(import_tool: Import) -> None:
    scenes: dict[str, Any] = {"caption": 100.0, "vqa": 60.0, "choice": 80.0, "ocr": 20.0}
    other: dict[str, Any] = {"caption": 110.0, "vqa": 62.0, "choice": 80.0, "ocr": 24.0}
    found = {
        "qmoe_vicuna": [result(import_tool, **scenes), result(import_tool, **scenes)],
        "post": [result(import_tool, **other), None],
    }
    whole, differences = grids_of(import_tool, "table3", "tiny", **found)
    # (60 + 80) / 2, (100 + 20) / 2, 260 / 4
    assert whole.rows[0][5:8] == ("70.0 ± 0.0", "60.0 ± 0.0", "65.0 ± 0.0")
    assert whole.rows[1][1:8] == ("110.0", "62.0", "80.0", "24.0", "71.0", "67.0", "69.0")
    assert whole.columns[8:10] == ("paper: GQA", "paper: OKVQA")
    assert whole.rows[1][8] == "63.56"
    assert differences.rows[0][5:8] == ("+1.0 (1/1)", "+7.0 (1/1)", "+4.0 (1/1)")
    assert any("Drop" in note for note in whole.notes)
    # no set of table 2 has a counterpart
    whole, _ = grids_of(import_tool, "table2", "tiny", qformer_vicuna=[result(import_tool, **scenes)])
    assert whole.columns[5] == "ours: mean"
    assert "no task of the scenes is held out of training: the scenes' scores" in whole.notes


def test_claims_of_q_moe(import_tool: Import, tmp_path: Path) -> None:
    """Two tasks, four images each: the path of an image says its task."""
    results, module, claims = (import_tool(f"reproducing.{name}") for name in ("results", "paper", "qmoe_claims"))
    paper = module.read_paper("qmoe")
    file = tmp_path / "paths.json"
    counts = {"vqa": {"0-1": 4}, "caption": {"2-1": 4}}
    file.write_text(json.dumps({"format": 1, "layers": [6, 7], "num_experts": 3, "counts": counts}))
    paths = PathStatistics.load(file)
    found = {
        "qformer_vicuna": [result(import_tool, parameters=2_000_000, vqa=50.0 + s, caption=90.0) for s in range(5)],
        "qmoe_vicuna": [
            result(import_tool, parameters=3_500_000, paths=paths, vqa=51.0 + 2 * s, caption=90.0) for s in range(5)
        ],
    }
    table = module.keep_rows(paper.tables["claims"], ("qmoe_vicuna",))
    timed: list[Any] = []

    def time_rows(table: Any) -> list[Any]:
        timed.append(table)
        return []

    grids = claims.claim_grids(paper, table, results.Results(5, found), "tiny", time_rows)
    assert [grid.title[:3] for grid in grids] == ["(a)", "(b)", "(c)", "(d)"]
    assert timed == [table]
    scores, tests, cost, taken = grids
    assert scores.columns == (
        "", "ours: vqa", "ours: caption", "ours: VQA", "ours: Caption", "ours: Average",
    )  # fmt: skip
    # differences 1, 2, 3, 4, 5: mean 3, t = 3 / (sqrt(2.5) / sqrt(5)) = 4.243 with 4 degrees of freedom
    assert tests.rows[0] == (
        "Q-MoE, Vicuna-7B - Q-Former, Vicuna-7B: vqa", "+3.00 ± 1.58 (5/5)", "0.0625",
        f"{2 * stats.t.sf(3 * math.sqrt(2), 4):.4f}",
    )  # fmt: skip
    assert tests.rows[1][1:] == ("+0.00 ± 0.00 (0/5)", "-", "-")
    assert tests.rows[-1][0].endswith(": Average")
    assert any("cannot go below 0.0625 with 5 seed(s)" in note for note in tests.notes)
    assert cost.columns == ("", "trained, M", "tune stage, s", "evaluation, s")
    assert cost.rows[1] == ("Q-MoE, Vicuna-7B", "3.500 ± 0.000", "100.0 ± 0.0", "10.0 ± 0.0")
    # two paths, each of half the images; log 2 nats, all that there is
    assert taken.rows[0][:4] == ("Q-MoE, Vicuna-7B", "2.0 ± 0.0", "50.0 ± 0.0", "0.693 ± 0.000")
    assert taken.rows[0][5] == "0.693 ± 0.000"
    assert len(taken.rows) == 1
