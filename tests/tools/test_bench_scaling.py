"""The scaling benchmark: what its points are, its form, its check. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_lvlm.routing import Modality
from tests.tools.conftest import Import

TINY = ["--tokens", "64", "--model-width", "16", "--ffn-width", "24", "--repeats", "2", "--warmup", "0"]


class Bench(NamedTuple):
    command: ModuleType
    problem: ModuleType
    sweeps: ModuleType
    check: ModuleType


@pytest.fixture(scope="module")
def bench(import_tool: Import) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    yield Bench(*map(import_tool, ("bench_scaling", "bench.problem", "bench.sweeps", "bench.check")))
    torch.set_num_threads(threads)


def setting_of(bench: Bench, **sizes: float) -> Any:
    given = {"tokens": 200, "model_width": 16, "ffn_width": 24, "experts": 4, "top_k": 2, "tail_share": 0.0} | sizes
    return bench.sweeps.Setting(
        sizes=bench.problem.Sizes(**given), dtype=torch.float32, device=torch.device("cpu"), seed=3
    )


def chosen_TE(problem: Any) -> Tensor:
    """Which experts each token takes, by a full sort of its scores."""
    scores_TE = problem.x_BSD[0].double() @ problem.gate_ED.double().T
    ranks_TE = scores_TE.argsort(dim=-1, descending=True).argsort(dim=-1)
    return ranks_TE < problem.sizes.top_k


def test_sweeps_are_reported_with_goals_and_floor(bench: Bench, tmp_path: Path) -> None:
    out, page, png = tmp_path / "a" / "s.json", tmp_path / "b" / "s.md", tmp_path / "c" / "s.png"
    values = ["--points", "experts=4,8", "--points", "tokens=32,64", "--points", "tail=0,0.25,1"]
    arguments = [*TINY, "--sweeps", "experts,tokens,tail,skew", *values]
    files = ["--json", str(out), "--markdown", str(page), "--png", str(png)]
    assert bench.command.main([*arguments, *files]) == 0
    result = json.loads(out.read_text())
    assert result["hardware"]["threads"] == 1
    assert result["config"]["rounds"] == 2
    sweeps = result["sweeps"]
    assert {name: [point["value"] for point in points] for name, points in sweeps.items()} == {
        "experts": [4, 8],
        "tokens": [32, 64],
        "tail": [0, 0.25, 1],
        "skew": [0.5, 0.7, 0.9, 1],
    }
    for points in sweeps.values():
        assert points[0]["ratio"] == points[0]["floor_ratio"] == 1.0
        assert all(point["ratio"] > 0 and point["spread"] >= 0 and point["ratio_to_dense"] > 0 for point in points)
    assert [point["goal"] for point in sweeps["experts"]] == [1.35, 1.35]
    # k = 2, a = 4: 1.03 x (1 + t)
    assert [point["goal"] for point in sweeps["tail"]] == pytest.approx([1.03, 1.2875, 2.06])
    assert [point["goal"] for point in sweeps["skew"]] == [1.05, 1.05, None, None]
    assert [point["rows"] for point in sweeps["tail"]] == [128, 128 + 16 * 2, 256]
    assert [point["rows"] for point in sweeps["experts"]] == [128, 128]
    assert page.read_text().count("| value | ratio |") == 4
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("share", "experts", "top_k"), [(0.7, 4, 2), (1.0, 4, 2), (0.9, 8, 1), (None, 8, 3)])
def test_a_given_share_of_tokens_takes_expert_0(bench: Bench, share: float | None, experts: int, top_k: int) -> None:
    setting = setting_of(bench, tokens=2000, experts=experts, top_k=top_k)
    plain = setting.draw()
    problem = bench.problem.with_load(plain, share, seed=5)
    counts_E = chosen_TE(problem).sum(dim=0)
    first = round(share * 2000) if share is not None else pytest.approx(2000 * top_k / experts, rel=0.1)
    assert int(counts_E[0]) == first
    others = (2000 * top_k - int(counts_E[0])) / (experts - 1)
    assert counts_E[1:].tolist() == pytest.approx([others] * (experts - 1), rel=0.4)
    # the same numbers in another order: nothing but the choice is set
    assert torch.equal(problem.x_BSD.sort(dim=-1).values, plain.x_BSD.sort(dim=-1).values)


def test_the_tail_is_exactly_what_the_rule_picks(bench: Bench) -> None:
    """LTDR eq. 9 and 11 by hand, also at half of the tokens and at nearly all."""
    for share in (0.05, 0.5, 0.95):
        problem = bench.problem.with_tail(setting_of(bench).draw(), share, seed=5)
        probs_TE = torch.softmax(problem.x_BSD[0].double() @ problem.gate_ED.double().T, dim=-1)
        variance_T = ((probs_TE - 1 / 4) ** 2).mean(dim=-1)
        assert bool((problem.context.modality_T == Modality.VISION).all())
        assert int((variance_T > variance_T.mean()).sum()) == round(share * 200)


def test_experts_share_rows_and_floor(bench: Bench) -> None:
    points = bench.sweeps.experts_points(setting_of(bench), (4, 16))
    assert [tuple(point.problem.w1_EFD.shape) for point in points] == [(4, 24, 16), (16, 24, 16)]
    assert points[0].floor_name == points[1].floor_name
    assert all(int(chosen_TE(point.problem).sum()) == point.rows == 400 for point in points)
    # 2 of 24 hidden units each
    assert points[0].floor().gate_proj.weight.shape == (48, 16)


def test_a_wrong_layer_is_not_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = bench.sweeps.ours_top_k
    doubled = lambda problem: right(bench.problem.replace(problem, w2_EDF=2 * problem.w2_EDF))  # noqa: E731
    monkeypatch.setattr(bench.sweeps, "ours_top_k", doubled)
    assert bench.command.main([*TINY, "--sweeps", "skew"]) == 1
    assert "check failed: skew 0.5: output is off" in capsys.readouterr().err


@pytest.mark.distributed
def test_processes_exchange_what_routing_asks_for(bench: Bench, tmp_path: Path) -> None:
    """Bytes that leave rank 0, by hand, for two processes with two of four experts each."""
    out = tmp_path / "s.json"
    arguments = [*TINY, "--sweeps", "ranks", "--points", "ranks=1,2", "--json", str(out)]
    assert bench.command.main(arguments) == 0
    one, two = json.loads(out.read_text())["sweeps"]["ranks"]
    assert (one["value"], one["exchanges"], one["sent_mib"]) == (1, 0, 0.0)
    assert two["value"] == 2
    # counts; rows, weights and rows back, and the gradients of these three
    assert two["exchanges"] == 7
    assert two["other_collectives"] == []
    assert two["host_syncs"] is None  # a CPU waits for nothing
    rows = [sent_rows(bench, source) for source in (0, 1)]
    # rank 0 sends: its rows to rank 1's experts and their gradients' way back from rank 1 (for which rank 0 sends the
    # gradients of what came back), and for the rows that rank 1 sent to it their results and the rows' gradients
    width, weight, counts = 16 * 4, 4, 2 * 4
    expected = 2 * (rows[0] + rows[1]) * width + (rows[0] + rows[1]) * weight + counts
    assert two["sent_mib"] * 2**20 == pytest.approx(expected)


def sent_rows(bench: Bench, source: int) -> int:
    """Rows of a process for the other's experts: 0 and 1 are held by process 0, 2 and 3 by process 1."""
    module = bench.command.measure_ranks.__globals__
    job = module["RanksJob"](
        sizes=setting_of(bench, tokens=64).sizes,
        ranks=(1, 2),
        dtype="fp32",
        device="cpu",
        clock="wall",
        threads=1,
        repeats=1,
        warmup=0,
        seed=0,
    )
    chosen = chosen_TE(module["_own_problem"](job, source, torch.device("cpu")))
    return int(chosen[:, 2:].sum() if source == 0 else chosen[:, :2].sum())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sweeps", "tail,width"], "--sweeps: width; allowed: experts, tokens, tail, skew, ranks"),
        (["--points", "tail"], "--points: 'tail'; allowed: numbers, comma-separated, after tail="),
        (["--points", "width=1"], "--points: 'width=1'; allowed: SWEEP=V,V with a sweep of experts"),
        (["--sweeps", "skew", "--points", "skew=0.2"], "--points: skew=0.2; allowed: 0.5 (an even load) and above"),
        (["--sweeps", "tail", "--points", "tail=0,2"], "--points: tail=2; allowed: 0 to 1"),
        (["--sweeps", "tail", "--points", "tail=0.1,0.3"], "--points: tail=0.1 first; allowed: 0, plain top-k"),
        (["--sweeps", "experts", "--points", "experts=4,4.5"], "--points: experts=4.5; allowed: whole numbers"),
        (["--sweeps", "experts", "--points", "experts=32"], "model_width: 16 with 32 experts whose load is set"),
        (["--sweeps", "ranks", "--points", "ranks=3"], "--points: ranks=3; allowed: what divides the experts (4)"),
    ],
)
def test_wrong_options_are_named(bench: Bench, arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert bench.command.main([*TINY, *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_keeps_the_sweeps_that_were_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(job: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.command, "measure_ranks", interrupt)
    out = tmp_path / "s.json"
    assert bench.command.main([*TINY, "--sweeps", "skew,ranks", "--json", str(out)]) == 130
    assert list(json.loads(out.read_text())["sweeps"]) == ["skew"]
