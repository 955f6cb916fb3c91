"""The checkpoint benchmark: its form, what it measures with. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from moe_lvlm.config.moe import MoEConfig
from tests.tools.conftest import Import

MIB = 2**20


class Bench(NamedTuple):
    command: ModuleType
    checkpoints: ModuleType
    disk: ModuleType


@pytest.fixture(scope="module")
def bench(import_tool: Import) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    yield Bench(*map(import_tool, ("bench_checkpoint", "bench.checkpoints", "bench.disk")))
    torch.set_num_threads(threads)


def test_the_whole_command(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "deep" / "c.json", tmp_path / "deep" / "c.md"
    arguments = ["--size", "12MiB", "--repeats", "2", "--dir", str(tmp_path / "work")]
    assert bench.command.main([*arguments, "--json", str(out), "--markdown", str(page)]) == 0
    result = json.loads(out.read_text())
    assert result["config"]["repeats"] == 2
    assert abs(result["config"]["checkpoint_bytes"] - 12 * MIB) < 4 * MIB
    assert set(result["works"]) | set(result["unavailable"]) == {
        "save", "verify", "merge", "split", "drop", "export", "upcycle",
    }  # fmt: skip
    for row in result["works"].values():
        assert row["ratio"] > 0 and row["spread"] >= 0 and row["peak_bytes"] >= 0
    for name in ("save", "merge", "split", "drop"):
        assert 1 <= result["works"][name]["write_ratio"] < 1.05, name
    assert result["works"]["save"]["read_bytes"] == 0
    assert result["works"]["verify"]["written_bytes"] == 0
    assert result["works"]["verify"]["is_within_goals"] is None
    assert result["hardware"]["torch"] == torch.__version__
    assert "on" in result["hardware"]["folder_device"]
    assert all(row["label"] in page.read_text() for row in result["works"].values())
    assert page.read_text() in capsys.readouterr().out
    assert list((tmp_path / "work").iterdir()) == []


def test_one_work_alone_and_an_unknown_one(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "1MiB", "--repeats", "1", "--dir", str(tmp_path)]
    assert bench.command.main([*arguments, "--only", "merge"]) == 0
    out = capsys.readouterr().out
    assert "reshard 16 files to 1" in out and "| save |" not in out
    assert bench.command.main([*arguments, "--only", "merge,sort"]) == 2
    assert "--only: sort; allowed: save, verify" in capsys.readouterr().err


def test_memory_is_seen_while_it_is_there(bench: Bench) -> None:
    watch = bench.disk.MemoryWatch()

    def take() -> None:
        kept = bytearray(b"\x01") * (64 * MIB)
        for _ in range(5):  # long enough to be seen
            kept.count(b"\x02")

    try:
        taken, idle = watch.measure(take), watch.measure(lambda: None)
    finally:
        watch.close()
    assert 60 * MIB < taken.peak_bytes < 80 * MIB
    assert idle.peak_bytes < 8 * MIB
    assert taken.seconds > idle.seconds


def test_written_bytes_are_counted(bench: Bench, tmp_path: Path) -> None:
    watch = bench.disk.MemoryWatch()
    try:
        cost = watch.measure(lambda: (tmp_path / "a").write_bytes(bytes(3 * MIB)))
    finally:
        watch.close()
    assert 3 * MIB <= cost.written_bytes < 3 * MIB + 10_000


def test_the_probe_reads_and_writes_what_it_says(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(MIB))
    assert bench.disk.read_seconds(bench.disk.files_of(tmp_path)) > 0
    assert bench.disk.write_seconds(tmp_path / "probe", 10 * MIB + 3, bytes(MIB)) > 0
    assert bench.disk.files_of(tmp_path) == [tmp_path / "a"]


@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_sizes_by_counting(bench: Bench, tmp_path: Path, num_experts: int) -> None:
    """The width that is chosen gives the size that was asked for, counted on the model itself."""
    moe = MoEConfig(num_experts=num_experts, top_k=2)
    wanted = 2**30
    width = bench.checkpoints.fitting_width(wanted, moe)
    dense, _ = bench.checkpoints._model_config(tmp_path, width)
    model = bench.checkpoints.build_empty(dense.with_moe(moe))
    size = sum(
        parameter.numel() * (12 if ".experts." in name or ".router." in name else 4)
        for name, parameter in model.named_parameters()
    )
    assert abs(size / wanted - 1) < 0.2
    # one layer's three stacks: E x 3 x D x F floats
    assert bench.checkpoints.largest_group(model) == num_experts * 3 * width * (width * 11 // 4) * 4


def test_summary_by_hand(bench: Bench) -> None:
    rounds = [
        bench.command.Round(
            seconds=seconds, probe_seconds=probe, peak_bytes=peak, wrote_bytes=102, read_bytes=50, output_bytes=100
        )
        for seconds, probe, peak in ((2.0, 2.0, 10), (2.4, 2.0, 30), (4.2, 3.0, 20))
    ]
    row = bench.command.summary("x", rounds, group_bytes=20, has_goal=True)
    # ratios 1.0, 1.2, 1.4
    assert row["ratio"] == pytest.approx(1.2)
    assert row["spread"] == pytest.approx(0.4 / 1.2)
    assert row["memory_ratio"] == 1.0
    assert row["write_ratio"] == pytest.approx(1.02)
    assert row["is_within_goals"] is False  # 2 % too many bytes were written
    assert bench.command.summary("x", rounds, group_bytes=20, has_goal=False)["is_within_goals"] is None
