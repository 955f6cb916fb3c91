"""The script that runs all benchmarks, on a CPU with tiny sizes: what it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "bench_gpu.sh"
BENCHES = ("layer_stablelm", "step", "layer_small", "layer_16", "layer_64", "scaling", "lora")


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | {"PYTHON": python},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def stand_in(folder: Path, body: str) -> str:
    """An interpreter that only notes what it was told: its arguments are $@."""
    path = folder / "python"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def assert_left(out: Path, name: str) -> None:
    """Log, JSON and page of a benchmark, its figure where it has one, all in the summary."""
    result = json.loads((out / f"{name}.json").read_text())
    assert result["hardware"]["device"]
    page = (out / f"{name}.md").read_text()
    summary = (out / "summary.md").read_text()
    assert page.strip() in summary
    if name != "lora":
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in summary
    assert f"| {name} |" in summary


def test_a_part_leaves_its_files(tmp_path: Path) -> None:
    ended = run("--device", "cpu", "--quick", "--only", "node,tests,lora", "--out", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    assert_left(tmp_path / "out", "lora")
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| tests | 0 | none: no tests for a GPU, or no GPU |" in summary
    assert "deepspeed 0." in summary


@pytest.mark.slow
def test_all_parts_leave_their_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run("--device", "cpu", "--quick", "--out", str(out), "--limit", "900")
    assert ended.returncode == 0, ended.stderr
    for name in BENCHES:
        assert_left(out, name)
    assert {"ours.json", "ours.md", "ours_bf16.md"} <= {path.name for path in (out / "where_time_goes").iterdir()}


def test_all_benchmarks_run_though_some_fail(tmp_path: Path) -> None:
    told = tmp_path / "told"
    python = stand_in(tmp_path, f'echo "$*" >>{told}; case "$*" in *bench_lora*|*bench_step*) exit 7;; esac')
    ended = run("--device", "cpu", "--out", str(tmp_path / "out"), python=python)
    assert ended.returncode == 1
    assert "bench_gpu.sh: step: failed with status 7" in ended.stderr
    assert "bench_gpu.sh: lora: failed with status 7" in ended.stderr
    lines = [line for line in told.read_text().splitlines() if "/tools/bench_" in line]
    assert len(lines) == len(BENCHES)
    assert all("--device cpu" in line and "--quick" not in line for line in lines)
    layer = lines[0]
    assert "--tokens 16384 --model-width 2048 --ffn-width 5632 --experts 4 --top-k 2" in layer
    assert "| layer_64 |" in (tmp_path / "out" / "summary.md").read_text()


def test_what_an_earlier_run_left_does_not_pass_for_this_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("lora.md", "step.md"):
        (out / name).write_text("old numbers")
    ended = run("--device", "cpu", "--only", "lora", "--out", str(out), python=stand_in(tmp_path, "exit 3"))
    assert ended.returncode == 1
    assert "old numbers" not in (out / "summary.md").read_text()
    assert (out / "step.md").exists()  # of a part that was not asked for


def test_time_is_limited(tmp_path: Path) -> None:
    """The first part is told to stop at the limit, and the others find no time."""
    out = tmp_path / "out"
    python = stand_in(
        tmp_path, f'trap "echo stopped >{tmp_path}/said; exit 130" INT; for i in $(seq 600); do sleep 0.1; done'
    )
    ended = run("--device", "cpu", "--only", "layer_16,layer_64", "--limit", "6", "--out", str(out), python=python)
    assert ended.returncode == 1
    assert (tmp_path / "said").read_text() == "stopped\n"
    assert "bench_gpu.sh: layer_16: cut off after 6 s" in ended.stderr
    assert "bench_gpu.sh: layer_64: not run: no time left of 6 s" in ended.stderr


def test_an_interrupted_part_is_the_last(tmp_path: Path) -> None:
    ended = run("--device", "cpu", "--only", "layer", "--out", str(tmp_path), python=stand_in(tmp_path, "exit 130"))
    assert ended.returncode == 130
    assert ended.stderr.count("(at most") == 1
    assert "| layer_stablelm | 0 | interrupted |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "layer,gpu"], "--only 'gpu'; allowed: layer, node tests layer_stablelm"),
        (["--device", "tpu"], "--device 'tpu'; allowed: cpu, cuda, cuda:N"),
        (["--limit", "0"], "--limit '0'; allowed: seconds"),
        (["--out"], "--out needs a value"),
        (["--fast"], "unknown argument '--fast'"),
    ],
)
def test_mistakes_end_with_status_2(arguments: list[str], said: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
