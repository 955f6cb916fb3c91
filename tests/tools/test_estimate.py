"""tools/estimate.py: what it prints and writes, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.tiny_run import write_run_inputs
from tests.tools.conftest import Import


@pytest.fixture(scope="module")
def tool(import_tool: Import) -> ModuleType:
    return import_tool("estimate")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run_inputs(tmp_path_factory.mktemp("tiny")))


def test_a_recipe(tool: ModuleType, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [recipe, "--gpu", "h100-80g", "--gpus-per-node", "2", "--text-tokens", "20", "--most", "3"]
    files = ["--json", str(tmp_path / "a" / "plan.json"), "--markdown", str(tmp_path / "plan.md")]
    assert tool.main([*arguments, *files, "parallel.expert_parallel_size=2"]) == 0
    out = capsys.readouterr().out
    assert "stage sparse, on 1 x 2 h100-80g" in out
    assert "parallel.expert_parallel_size=2 train.gradient_checkpointing=false" in out
    assert "| all-to-all |" in out and "**: " in out
    assert (tmp_path / "plan.md").read_text().strip() == out.strip()
    result = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert result["hardware"] == {"gpu": "h100-80g", "nodes": 1, "gpus": 2}
    now = result["as_it_stands"]
    assert now["fits"] and now["device_bytes"] == sum(now["memory"].values())
    assert now["step_seconds"] == pytest.approx(sum(now["seconds"].values()))
    assert [one["fits"] for one in result["fitting"]] == [True] * len(result["fitting"])
    assert result["fitting"][0]["step_seconds"] <= now["step_seconds"]


def test_another_stage_of_this_machine(tool: ModuleType, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([recipe, "--stage", "tune", "--measure", "--gpus-per-node", "2", "--text-tokens", "20"]) == 0
    out = capsys.readouterr().out
    assert "stage tune, on 1 x 2 cpu" in out
    assert "experts" not in out.split("Settings that fit")[0].split("Time of a step")[1]


def test_scaling(tool: ModuleType, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [recipe, "--scaling", "--gpus-per-node", "2", "--text-tokens", "20", "--network", "2x100"]
    assert tool.main([*arguments, "--png", str(tmp_path / "s.png"), "--json", str(tmp_path / "s.json")]) == 0
    assert capsys.readouterr().out.count("| weak |") == 8
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    (points,) = json.loads((tmp_path / "s.json").read_text()).values()
    assert points[0]["efficiency"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "b300"], "--gpu: b300; allowed: a800-80g"),
        (["--stage", "tun"], "tun: no stage of recipe"),
        (["--nodes", "0"], "allowed: a whole number above 0"),
        (["--nodes", "3"], "global_batch"),
        (["--network", "8"], "allowed: adapters of a node x Gb/s"),
        (["--gpus-per-node", "2", "--tail-share", "2"], "tail_share: 2.0; allowed: 0 to 1"),
        (["--text-tokens", "0"], "mean_text: 0.0; allowed: 1 to"),
        (["--png", "a.png"], "--png: the figure is that of --scaling"),
        (["parallel.deepspeed=zero9"], "zero9"),
    ],
)
def test_mistakes(
    tool: ModuleType, recipe: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = tool.main([recipe, *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
