"""Tables of papers made again: their numbers, what is trained for them, and that a run begun from shared dense stages
is the unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from moe_lvlm.analysis.paths import PathStatistics
from moe_lvlm.analysis.statistics import RoutingStatistics
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision, Site
from tests.tiny_run import tiny_recipe, write_run_inputs

ROOT = Path(__file__).parents[2]
Import = Callable[[str], ModuleType]
SMALL = [
    f"stages.{stage}.{key}={value}"
    for stage in range(3)
    for key, value in {"steps": 2, "micro_batch": 8, "global_batch": 8}.items()
] + ["evaluation.tasks.0.limit=8", "train.log_every=1"]
ROWS = {
    "moe_llava_stablelm": {"router": {"kind": "top_k"}, "balance": {"on": ["language", "vision"]}},
    "dar": {"router": {"kind": "top_k"}, "balance": {"on": ["language"]}},
    "ltdr_stablelm": {"router": {"kind": "ltdr"}, "balance": {"on": ["language"]}},
    "ltdr_qwen": {"router": {"kind": "ltdr"}, "balance": {"on": ["language"]}},
}


@pytest.fixture(scope="module")
def reproduce(import_tool: Import) -> ModuleType:
    return import_tool("reproduce")


# the paper's numbers


TABLES = {
    "ltdr": ["table1", "table3", "table4", "table5", "table6", "table7", "table11", "table12", "figure1b", "figure4",
             "figure5", "claims"],
    "mocle": ["table2", "table3", "table4", "table5", "table6", "table7", "figure3_clusters", "figure3_experts",
              "figure3_temperature", "conflict", "conflict_gating"],
    "qmoe": ["table1", "table2", "table3", "table4", "table5", "table6", "figure3", "claims"],
}  # fmt: skip


def test_list_names_every_table_and_its_rows(reproduce: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == list(TABLES)
    tables = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert tables == [f"{paper}.{table}" for paper, names in TABLES.items() for table in names]
    assert {"shared_1x1_16x025", "mix_coco_qmoe"} <= {line.split()[0] for line in lines}


@pytest.mark.parametrize("paper", TABLES)
def test_every_row_is_a_recipe_and_every_recipe_a_row(import_tool: Import, paper: str) -> None:
    from moe_lvlm.config.load import list_recipes

    found = import_tool("reproducing.paper").read_paper(paper)
    rows = {f"{found.recipes}/{row.recipe}" for table in found.tables.values() for row in table.rows}
    assert rows == {name for name in list_recipes() if name.startswith(f"{found.recipes}/")}


@pytest.mark.parametrize(
    ("text", "paper", "tables"),
    [
        ("3", "ltdr", ["table3"]),
        ("table12", "ltdr", ["table12"]),
        ("1b", "ltdr", ["figure1b"]),
        ("claims", "ltdr", ["claims"]),
        ("4", "ltdr", ["table4"]),
        ("ltdr.table3", "ltdr", ["table3"]),
        ("mocle.table7", "mocle", ["table7"]),
        ("mocle.7", "mocle", ["table7"]),
        ("mocle.figure3_clusters", "mocle", ["figure3_clusters"]),
        ("mocle.3_clusters", "mocle", ["figure3_clusters"]),
        ("qmoe.table4", "qmoe", ["table4"]),
        ("qmoe.4", "qmoe", ["table4"]),
        ("qmoe.3", "qmoe", ["table3"]),
        ("qmoe.figure3", "qmoe", ["figure3"]),
        ("qmoe.claims", "qmoe", ["claims"]),
        ("all", "ltdr", TABLES["ltdr"]),
        ("qmoe.all", "qmoe", TABLES["qmoe"]),
    ],
)
def test_tables_have_short_names(import_tool: Import, text: str, paper: str, tables: list[str]) -> None:
    module = import_tool("reproducing.paper")
    found, chosen = module.choose(text, module.read_papers())
    assert found.name == paper
    assert [table.name for table in chosen] == tables


def test_unknown_names_are_told(reproduce: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["table2"]) == 2
    assert "'table2': no such table; allowed: table1, table3" in capsys.readouterr().err
    assert reproduce.main(["qmoe.table7"]) == 2
    assert "'qmoe.table7': no such table; allowed: table1, table2" in capsys.readouterr().err
    assert reproduce.main(["moe.table1"]) == 2
    assert "'moe.table1': no paper 'moe'; allowed: ltdr, mocle, qmoe, before a dot" in capsys.readouterr().err
    assert reproduce.main(["3", "--rows", "dar,vht"]) == 2
    assert "vht: not in table3; allowed: moe_llava_stablelm, dar, eea" in capsys.readouterr().err
    assert reproduce.main(["qmoe.all", "--rows", "pre"]) == 2
    assert "--rows: rows of one table, but TABLE is qmoe.all" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        reproduce.main([])
    assert ended.value.code == 2


def test_chosen_rows_keep_their_baselines(import_tool: Import) -> None:
    paper = import_tool("reproducing.paper")
    papers = paper.read_papers()
    kept = paper.keep_rows(papers["ltdr"].tables["table1"], ("ltdr_qwen",))
    assert [row.recipe for row in kept.rows] == ["moe_llava_qwen", "ltdr_qwen"]
    kept = paper.keep_rows(papers["qmoe"].tables["table6"], ("mix_coco_qmoe",))
    assert [row.recipe for row in kept.rows] == ["mix_coco_qformer", "mix_coco_qmoe"]


def test_a_wrong_paper_is_told(import_tool: Import, tmp_path: Path) -> None:
    module = import_tool("reproducing.paper")

    def error(**changes: Any) -> str:
        row = {"recipe": "a", "label": "A", "paper": [1.0]} | changes
        table = {"title": "T", "kind": row.pop("kind", "scores"), "columns": ["x"], "baseline": "a", "rows": [row]}
        data = {"title": "P", "recipes": "p", "unit": "u", "scores": {}, "tables": {"table1": table}}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
        with pytest.raises(ValueError) as caught:
            module.read_paper("p", tmp_path)
        return str(caught.value)

    assert error(paper=[1.0, 2.0]).endswith("p.yaml: table1: a: 2 values; allowed: 1, one a column")
    assert error(paper=[]).endswith("table1: a: 0 values; allowed: 1, one a column")
    assert error(baseline="b").endswith("table1: a: baseline 'b' is no row of the table; allowed: a")
    assert error(over=["y"]).endswith("table1: a: over: y; allowed: x")
    assert error(kind="plot").endswith("table1: kind 'plot'; allowed: scores, timing, figure, claims")


# what is trained


@dataclass(frozen=True)
class Inputs:
    """Recipes of some rows: tiny models on made-up data, without the key `scale`."""

    folder: Path

    def options(self, plan: ModuleType, out: Path, **changes: Any) -> Any:
        return plan.Options(**({"scale": None, "out": out, "recipes": str(self.folder / "recipes")} | changes))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    write_run_inputs(folder)
    (folder / "recipes").mkdir()
    for name, moe in ROWS.items():
        recipe = tiny_recipe(folder, name=name, moe={"num_experts": 4, "top_k": 2, **moe})
        recipe["evaluation"] = {"tasks": [{"name": "colors", "path": "train.json", "max_new_tokens": 2, "limit": 4}]}
        (folder / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return Inputs(folder)


def test_equal_rows_are_one_run_and_share_their_dense_stages(
    import_tool: Import, inputs: Inputs, tmp_path: Path
) -> None:
    plan = import_tool("reproducing.plan")
    made = plan.make_plan([*ROWS, "dar"], 2, inputs.options(plan, tmp_path))
    assert [run.name for run in made.runs] == [
        "moe_llava_stablelm-plain-s0", "dar-plain-s0", "ltdr_stablelm-plain-s0",
        "moe_llava_stablelm-plain-s1", "dar-plain-s1", "ltdr_stablelm-plain-s1",
    ]  # fmt: skip
    assert made.of("ltdr_qwen", 1) is made.of("ltdr_stablelm", 1)
    assert len(made.dense) == 2
    assert [stage.name for stage in made.dense[0].recipe.stages] == ["tune"]


def test_attention_weights_do_not_part_dense_stages(import_tool: Import, inputs: Inputs, tmp_path: Path) -> None:
    plan = import_tool("reproducing.plan")
    one, other = (
        plan.make_plan(["dar"], 1, inputs.options(plan, tmp_path, overrides=changes)).runs[0]
        for changes in ((), ("model.attention=eager",))
    )
    assert one.dense.name == other.dense.name
    assert one.digest != other.digest
    assert (one.recipe.model.attention, other.recipe.model.attention) == ("sdpa", "eager")


def test_another_setting_is_another_run(import_tool: Import, inputs: Inputs, tmp_path: Path) -> None:
    plan = import_tool("reproducing.plan")

    def digest(*overrides: str) -> str:
        return str(plan.make_plan(["dar"], 1, inputs.options(plan, tmp_path, overrides=overrides)).runs[0].digest)

    assert digest("train.log_every=7", "evaluation.batch_size=5", "parallel.deepspeed=zero1") == digest()
    assert digest("stages.1.learning_rate=0.5") != digest()


def test_rows_of_the_paper_share_dense_stages(reproduce: ModuleType, tmp_path: Path, capsys: Any) -> None:
    assert reproduce.main(["all", "--dry-run", "--out", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert sum(line.startswith("dense-") for line in lines) == 1
    assert len(lines) == 2 + 20
    assert "moe_llava_stablelm-tiny-s0  [to do]  moe_llava_stablelm, moe_llava_qwen, moe_llava_phi2" in lines
    assert not list(tmp_path.iterdir())


def test_a_connector_has_no_dense_stages_to_share(reproduce: ModuleType, tmp_path: Path, capsys: Any) -> None:
    """One run a recipe: 4 of table 1, 4 of tables 3 and 4, 4 of table 5, 6 of table 6."""
    assert reproduce.main(["qmoe.all", "--dry-run", "--out", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert len(lines) == 1 + 4 + 4 + 4 + 6
    assert {"qmoe_vicuna-tiny-s0  [to do]  qmoe_vicuna", "post-tiny-s0  [to do]  post"} <= set(lines)
    assert not list(tmp_path.iterdir())


def test_adapters_share_the_stages_before_them(reproduce: ModuleType, tmp_path: Path, capsys: Any) -> None:
    """LLaVA's rows begin with one aligned projector, whatever the adapter; InstructBLIP's have one stage."""
    assert reproduce.main(["mocle.table4", "--rows", "llava_mocle", "--dry-run", "--out", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.partition("-")[0] for line in lines if line.startswith("dense-")] == ["dense"]
    assert {"llava_lora-tiny-s0  [to do]  llava_lora", "llava_mocle-tiny-s0  [to do]  llava_mocle"} <= set(lines)
    assert reproduce.main(["mocle.table7", "--dry-run", "--out", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert not any(line.startswith("dense-") for line in lines)
    assert len(lines) == 1 + 4


# jobs


def test_jobs_wait_for_theirs_and_fail_alone(import_tool: Import) -> None:
    jobs = import_tool("reproducing.jobs")
    order: list[str] = []
    lock = threading.Lock()

    def work(name: str, problem: Exception | None = None) -> Callable[[int], None]:
        def do(slot: int) -> None:
            time.sleep(0.01)
            with lock:
                order.append(name)
            if problem is not None:
                raise problem

        return do

    dense, bad = jobs.Job("dense", work("dense")), jobs.Job("bad", work("bad", ValueError("no such file")))
    broken = jobs.Job("broken", work("broken", KeyError("ours")))
    todo = [dense, jobs.Job("a", work("a"), after=dense), bad, jobs.Job("b", work("b"), after=bad), broken]
    jobs.run_jobs(todo, slots=3, launcher=jobs.Launcher(), on_change=lambda: None)
    assert [job.state for job in todo] == ["done", "done", "failed", "failed", "failed"]
    assert order.index("dense") < order.index("a")
    assert "b" not in order
    assert bad.problem == "no such file"
    assert todo[3].problem == "b: not begun, since bad failed"
    assert "KeyError: 'ours'" in broken.problem


def test_commands_write_into_their_log(import_tool: Import, tmp_path: Path) -> None:
    jobs = import_tool("reproducing.jobs")
    launcher = jobs.Launcher()
    assert launcher.call(["recipes", "nope"], 1, tmp_path / "logs" / "a.log", slot=0) == 2
    said = (tmp_path / "logs" / "a.log").read_text()
    assert said.startswith("$ ")
    assert "unknown recipe 'nope'" in said


def test_gpus_are_shared_out(import_tool: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = import_tool("reproducing.machine")
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo GPU $i; done\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.choose_machine(jobs=None, processes=None, scale="full") == machine.Machine(
        jobs=1, processes=4, gpus=("0", "1", "2", "3")
    )
    assert machine.choose_machine(jobs=None, processes=2, scale="tiny").gpus_by_job == [("0", "1"), ("2", "3")]
    with pytest.raises(
        ValueError, match="--jobs 3: 6 GPUs with --processes 2, of which there are 4; allowed: --jobs 1 to 2"
    ):
        machine.choose_machine(jobs=3, processes=2, scale="tiny")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert machine.choose_machine(jobs=None, processes=1, scale="tiny").gpus_by_job == [("3",), ("1",)]
    assert machine.choose_machine(jobs=1, processes=4, scale="tiny").gpus_by_job == []


def test_figures_are_drawn(import_tool: Import, run_statistics: RoutingStatistics, tmp_path: Path) -> None:
    results, paper, figures = (import_tool(f"reproducing.{name}") for name in ("results", "paper", "figures"))
    one = results.RunResult(
        name="a", folder="", seed=0, scores={}, parameters=1, train_seconds={}, eval_seconds=1.0, jobs=1,
        environment=None, routing=run_statistics,
    )  # fmt: skip
    found = results.Results(2, {"moe_llava_stablelm": [one, one], "dar": [one, None], "ltdr_stablelm": [one, one]})
    tables = paper.read_paper("ltdr").tables
    for name in ("figure1b", "figure4", "figure5"):
        path = figures.draw("ltdr", tables[name], found, tmp_path)
        assert path == tmp_path / f"ltdr-{name}.png"
        assert Image.open(path).size[0] > 500
    assert figures.draw("ltdr", tables["figure4"], results.Results(1, {}), tmp_path) is None
    pooled = figures.pooled(found, "moe_llava_stablelm")
    assert [values.tokens.tolist() for _, values in pooled.items()] == [[8, 12, 2]]  # of both seeds


def test_the_heat_map_of_paths_is_drawn(import_tool: Import, tmp_path: Path) -> None:
    """Figure 3: of the first run that has paths; a Q-Former has none."""
    results, paper, figures = (import_tool(f"reproducing.{name}") for name in ("results", "paper", "figures"))
    file = tmp_path / "paths.json"
    counts = {"vqa": {"0-1": 3, "1-1": 1}, "caption": {"2-1": 4}}
    file.write_text(json.dumps({"format": 1, "layers": [6, 7], "num_experts": 3, "counts": counts}))

    def result(paths: PathStatistics | None) -> Any:
        return results.RunResult(
            name="a", folder="", seed=0, scores={}, parameters=1, train_seconds={}, eval_seconds=1.0, jobs=1,
            environment=None, routing=None, paths=paths,
        )  # fmt: skip

    table = paper.read_paper("qmoe").tables["figure3"]
    found = results.Results(2, {"qmoe_vicuna": [None, result(PathStatistics.load(file))]})
    path = figures.draw("qmoe", table, found, tmp_path)
    assert path == tmp_path / "qmoe-figure3.png"
    assert Image.open(path).size[0] > 500
    assert found.by_row["qmoe_vicuna"][1].to_json()["paths"]["counts"] == counts
    assert figures.draw("qmoe", table, results.Results(1, {"qmoe_vicuna": [result(None)]}), tmp_path) is None
    with pytest.raises(ValueError, match=r"ltdr\.figure3: no figure; allowed: ltdr\.figure1b"):
        figures.draw("ltdr", table, found, tmp_path)


@pytest.fixture
def run_statistics() -> RoutingStatistics:
    """One layer: four words, of six patches the last is sure of its expert and is the tail."""
    context = RoutingContext(
        modality_BS=torch.tensor([[int(Modality.VISION)] * 6 + [int(Modality.LANGUAGE)] * 4], dtype=torch.int8),
        image_BS=torch.tensor([[0] * 6 + [-1] * 4], dtype=torch.int32),
        sample_BS=torch.zeros(1, 10, dtype=torch.int32),
    )
    probs_TE = torch.tensor([[0.3, 0.3, 0.2, 0.2]] * 5 + [[0.97, 0.01, 0.01, 0.01]] + [[0.4, 0.2, 0.2, 0.2]] * 4)
    top = probs_TE.topk(2, dim=-1)
    trace = RoutingTrace(context)
    kept = torch.ones(10, 2, dtype=torch.bool)
    trace.record(Site("language_model", 0), RoutingDecision(probs_TE.log(), probs_TE, top.indices, top.values, kept))
    statistics = RoutingStatistics()
    statistics.update(trace)
    return statistics


# the runs themselves


@dataclass(frozen=True)
class Made:
    """A session whose runs were made, and how they ended."""

    session: Any
    outcome: Any


@pytest.fixture(scope="module")
def made(import_tool: Import, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Made:
    session = make_session(import_tool, inputs, tmp_path_factory.mktemp("out"))
    return Made(session, session.make_runs())


def make_session(import_tool: Import, inputs: Inputs, out: Path, *overrides: str) -> Any:
    session, plan, paper = (import_tool(f"reproducing.{name}") for name in ("session", "plan", "paper"))
    ltdr = paper.read_paper("ltdr")
    table = paper.keep_rows(ltdr.tables["claims"], ("ltdr_stablelm",))
    return session.Session(
        paper=ltdr,
        tables=(table,),
        plan=plan.make_plan([row.recipe for row in table.rows], 1, inputs.options(plan, out, overrides=overrides)),
        out=out,
        scale="tiny",
        seeds=1,
        machine=session.Machine(jobs=2, processes=1),
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(event["global_step"], event["loss"]) for event in events if event["event"] == "step"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu",
                         "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


@pytest.mark.distributed
def test_a_run_from_shared_stages_is_the_unbroken_one(made: Made, tmp_path: Path) -> None:
    assert (made.outcome.problems, made.outcome.stopped) == ((), ())
    run = made.session.plan.of("ltdr_stablelm", 0)
    command = ["-m", "moe_lvlm", "train", run.source, "seed=0", f"output_dir={tmp_path / 'unbroken'}"]
    subprocess.run([sys.executable, *command], check=True, env=environment(), capture_output=True, timeout=300)
    assert losses(run.folder) == losses(tmp_path / "unbroken")
    assert [step for step, _ in losses(run.folder)] == list(range(1, 9))
    ends = [
        folder / "checkpoints" / "sparse-000005" / "rank-00000.safetensors"
        for folder in (run.folder, tmp_path / "unbroken")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.distributed
def test_dense_stages_take_no_more_room(made: Made) -> None:
    run = made.session.plan.of("ltdr_stablelm", 0)
    file = Path("checkpoints") / "tune-000003" / "rank-00000.safetensors"
    assert (run.folder / file).samefile(run.dense.folder / file)


@pytest.mark.distributed
def test_what_is_done_is_not_done_again(made: Made, import_tool: Import, inputs: Inputs) -> None:
    again = make_session(import_tool, inputs, made.session.out)
    again.check()
    assert again._jobs() == []
    assert again.describe().count("[done]") == 3
    # other questions: the model stays, its scores do not
    other = make_session(import_tool, inputs, made.session.out, "evaluation.tasks.0.limit=3")
    other.check()
    assert [job.name for job in other._jobs()] == ["moe_llava_stablelm-plain-s0", "ltdr_stablelm-plain-s0"]
    assert other.describe().count("[trained]") == 2


@pytest.mark.distributed
def test_a_folder_of_another_recipe_is_refused(made: Made, import_tool: Import, inputs: Inputs) -> None:
    other = make_session(import_tool, inputs, made.session.out, "stages.1.steps=6")
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(stages.1.steps: 5 before, 6 now\)"):
        other.check()


@pytest.mark.distributed
def test_the_report_has_all_of_it(made: Made) -> None:
    grids, data = made.session.report()
    titles = [grid.title for grid in grids]
    assert [title[:3] for title in titles] == ["(a)", "(a)", "(b)", "(c)", "(c)", "(d)", "(d)", "(e)", "Tab"]
    scores = json.loads((made.session.plan.of("ltdr_stablelm", 0).folder / "metrics.json").read_text())["eval"]
    shown = {row[0]: row for row in grids[titles.index("(d) Scores")].rows}
    assert shown["LTDR"][1] == f"{100 * scores['colors']['accuracy']:.1f}"
    run = data["runs"]["ltdr_stablelm-plain-s0"]
    assert run["scores"]["colors.accuracy"] == 100 * scores["colors"]["accuracy"]
    assert run["expert_rows_per_token"]["language"] == 2.0  # top-2, and no tail among words
    assert run["expert_rows_per_token"]["vision"] > 2.0
    assert "torch" in data["hardware"]
    json.dumps(data)


@pytest.mark.slow
def test_a_failed_run_is_named_with_its_log(import_tool: Import, inputs: Inputs, tmp_path: Path) -> None:
    session = make_session(import_tool, inputs, tmp_path, "data.mixture=[{path: missing.json}]")
    outcome = session.make_runs()
    assert len(outcome.problems) == 3  # the dense stages, and the two runs that wait for them
    assert "training ended with status 2; the end of" in outcome.problems[0]
    assert "missing.json" in outcome.problems[0]


@pytest.mark.slow
def test_the_tool_makes_a_table(tmp_path: Path) -> None:
    """Shipped recipes with two steps a stage: twice the same command, the second makes nothing anew."""
    overrides = [word for setting in SMALL for word in ("--override", setting)]
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), "7", "--rows", "vht", "--out", str(tmp_path / "out"),
               "--json", str(tmp_path / "table.json"), "--markdown", str(tmp_path / "table.md"), *overrides]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
        assert done.returncode == 0, done.stderr
        assert "tiny scale shows the direction of an effect at best, not the paper's numbers" in done.stdout
        assert "58.0" in done.stdout  # the paper's Avg of VHT
    assert "running" not in done.stderr
    data = json.loads((tmp_path / "table.json").read_text())
    assert data["failed"] == []
    assert set(data["runs"]) == {"moe_llava_stablelm-tiny-s0", "vht-tiny-s0"}
    assert "### Table 7" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_tool_makes_tables_of_q_moe(tmp_path: Path) -> None:
    """Two steps of two recipes; then all that the claims and figure 3 need is there, and is not made anew."""
    small = {"stages.0.steps": 2, "stages.0.micro_batch": 8, "stages.0.global_batch": 8, "train.log_every": 1}
    small |= {f"evaluation.tasks.{place}.limit": 4 for place in range(4)}
    overrides = [word for key, value in small.items() for word in ("--override", f"{key}={value}")]

    def call(*arguments: str) -> tuple[str, dict[str, Any]]:
        command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *arguments, "--out", str(tmp_path / "out"),
                   "--json", str(tmp_path / "table.json"), *overrides]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / "table.json").read_text())

    said, data = call("qmoe.1", "--rows", "qmoe_vicuna")
    assert "ours: ocr" in said
    assert "87.35" in said  # the paper's Average of Q-MoE
    assert data["paper"] == "qmoe"
    assert list(data["runs"]) == ["qformer_vicuna-tiny-s0", "qmoe_vicuna-tiny-s0"]
    qformer, qmoe = data["runs"].values()
    assert qformer["paths"] is None
    assert sum(qmoe["paths"]["counts"]["vqa"].values()) == 4
    assert qmoe["trained_parameters"] > qformer["trained_parameters"]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/checkpoints/*")}

    said, data = call("qmoe.claims", "--rows", "qmoe_vicuna")
    assert [line[:3] for line in said.splitlines() if line.startswith("(")] == ["(a)", "(b)", "(c)", "(d)"]
    assert [timed["recipe"] for timed in data["tables"]["claims"]["timed"]] == ["qformer_vicuna", "qmoe_vicuna"]
    _, data = call("qmoe.figure3")
    assert Path(data["tables"]["figure3"]["figure"]).is_file()
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/checkpoints/*")}


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    overrides = [word for setting in [*SMALL, "stages.1.steps=400"] for word in ("--override", setting)]
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), "3", "--rows", "moe_llava_stablelm", "--out", str(out),
               *overrides]  # fmt: skip
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not any('"tune"' in p.read_text() for p in out.glob("dense-*/log.jsonl")):
        time.sleep(0.2)
    tool.send_signal(signal.SIGINT)
    _, said = tool.communicate(timeout=300)
    assert tool.returncode == 130, said
    assert "the same command goes on" in said
    [log] = out.glob("dense-*/log.jsonl")
    assert '"stopped"' in log.read_text()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    assert '"resume"' in log.read_text()
    steps = [step for step, _ in losses(out / "moe_llava_stablelm-tiny-s0")]
    assert sorted(set(steps)) == list(range(1, 405))
