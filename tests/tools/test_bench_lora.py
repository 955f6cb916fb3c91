"""The benchmark of adapters: its form, its check, what it refuses. No time is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from tests.tools.conftest import Import

TINY = ["--linears", "24x32,32x16", "--batch", "3", "--sequence", "5", "--rank", "2", "--repeats", "2", "--warmup", "0"]
NAMES = ["dense", "lora", "mocle", "mocle_top2", "mocle_token", "gathered", "masked", "peft"]


class Bench(NamedTuple):
    command: ModuleType
    lora: ModuleType
    check: ModuleType


@pytest.fixture(scope="module")
def bench(import_tool: Import) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    yield Bench(import_tool("bench_lora"), import_tool("bench.lora"), import_tool("bench.check"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_variant_is_checked_and_reported(bench: Bench, tmp_path: Path, dtype: str) -> None:
    """PEFT among them: it is there for the tests."""
    files = ["--json", str(tmp_path / "a" / "lora.json"), "--markdown", str(tmp_path / "b" / "lora.md")]
    assert bench.command.main([*TINY, "--dtype", dtype, *files]) == 0
    result = json.loads((tmp_path / "a" / "lora.json").read_text())
    assert not result["unavailable"]
    assert list(result["linears"]) == ["24x32", "32x16"]
    for rows in result["linears"].values():
        assert list(rows) == NAMES
        assert rows["dense"]["ratio_to_base"] == 1.0
        assert all(row["milliseconds"] > 0 for row in rows.values())
    assert result["config"]["rounds"] == 2
    page = (tmp_path / "b" / "lora.md").read_text()
    assert page.count("| MoCLE, all experts masked |") == 2


def test_a_wrong_variant_is_not_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wrong = tuple(
        replace(one, plain=bench.lora.LORA_VARIANTS[0].plain) if one.name == "mocle" else one
        for one in bench.lora.LORA_VARIANTS
    )
    monkeypatch.setattr(bench.lora, "LORA_VARIANTS", wrong)
    assert bench.command.main([*TINY, "--variants", "mocle"]) == 1
    assert "check failed: mocle: output is off by" in capsys.readouterr().err
    assert bench.command.main([*TINY, "--variants", "mocle", "--no-check"]) == 0


def test_what_cannot_run_is_listed(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    assert bench.command.main([*TINY, "--variants", "peft", "--json", str(tmp_path / "lora.json")]) == 0
    result = json.loads((tmp_path / "lora.json").read_text())
    assert "peft is not installed" in result["unavailable"]["peft"]
    assert list(result["linears"]["24x32"]) == ["dense"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--linears", "24"], "--linears: '24'; allowed: inputs x outputs"),
        (["--rank", "0"], "rank: 0; allowed: 1 and above"),
        (["--variants", "fast"], "--variants: 'fast'; allowed: dense, lora, mocle"),
    ],
)
def test_wrong_arguments(bench: Bench, capsys: pytest.CaptureFixture, arguments: list[str], said: str) -> None:
    assert bench.command.main([*TINY, *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_samples_spread_over_the_experts(bench: Bench) -> None:
    """At the default sizes every expert has a sample, so that none is left out of the time."""
    sizes = bench.lora.LoRASizes(batch=16, sequence=1, inputs=8, outputs=8, experts=4, rank=1)
    problem = bench.lora.draw_lora_problem(sizes, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    best = (problem.embedding_BG @ problem.gate_EG.t()).argmax(dim=-1)
    assert len(best.unique()) == 4
