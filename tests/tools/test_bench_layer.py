"""The layer benchmark: its form, its check, what it counts. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.tools.conftest import Import

TINY = ["--tokens", "64", "--model-width", "32", "--ffn-width", "48", "--repeats", "2", "--warmup", "0"]
RIVALS = {
    "transformers_eager",
    "transformers_grouped_mm",
    "deepspeed_dropless",
    "deepspeed_capacity",
    "deepspeed_einsum",
}
OURS = {"ours", "ours_ltdr", "ours_ltdr_masked", "ours_stgc", "ours_dynamic"}


class Bench(NamedTuple):
    command: ModuleType
    check: ModuleType
    layers: ModuleType
    measure: ModuleType
    problem: ModuleType
    variants: ModuleType


@pytest.fixture(scope="module")
def bench(import_tool: Import) -> Iterator[Bench]:
    """The tool and its modules."""
    threads = torch.get_num_threads()
    modules = ("check", "layers", "measure", "problem", "variants")
    yield Bench(import_tool("bench_layer"), *(import_tool(f"bench.{name}") for name in modules))
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def problem_of(bench: Bench, **sizes: float) -> Any:
    given = {"tokens": 64, "model_width": 32, "ffn_width": 48, "experts": 4, "top_k": 2, "tail_share": 0.13} | sizes
    return bench.problem.draw_problem(
        bench.problem.Sizes(**given), dtype=torch.float32, device=torch.device("cpu"), seed=0
    )


def test_json_has_the_agreed_form_for_one_type(bench: Bench, tmp_path: Path) -> None:
    out, page = tmp_path / "deep" / "layer.json", tmp_path / "layer.md"
    assert bench.command.main([*TINY, "--dtype", "fp32", "--json", str(out), "--markdown", str(page)]) == 0
    result = json.loads(out.read_text())
    assert result["config"]["tokens"] == 64
    assert result["config"]["rounds"] == 2
    assert result["hardware"]["threads"] == 1
    assert result["hardware"]["torch"] == torch.__version__
    assert set(result["variants"]) == {"dense"} | OURS | RIVALS
    for row in result["variants"].values():
        assert row["ratio_to_dense"] > 0
        assert row["spread"] >= 0
        assert row["saved_mib"] > 0
        assert row["dropped"] == 0 or row["label"].startswith("DeepSpeed MoE")
    assert result["variants"]["dense"]["ratio_to_dense"] == 1.0
    for name in ("dense", "ours"):
        # forward and backward of 64 x 2 rows through three 32 x 48 matrices: 18 FLOPs a number; the gate of 4 experts
        needed = 18 * 64 * 2 * 32 * 48 + (0 if name == "dense" else 6 * 64 * 4 * 32)
        row = result["variants"][name]
        assert row["tflops"] * 1e12 * row["milliseconds"] / 1e3 == pytest.approx(needed)
        peak = result["config"]["peaks"]["fp32"]["tflops"]
        assert row["mfu_needed"] == row["mfu_six_n"] == pytest.approx(row["tflops"] / peak)
        # x of 64 x 32, gate and up of 128 x 48, in 4 bytes
        assert row["saved_over_floor"] * (64 * 32 + 2 * 128 * 48) * 4 / 2**20 == pytest.approx(row["saved_mib"])
        assert row["host_syncs"] is row["kernels"] is None
    # 8 of 64 tokens are on 4 experts instead of 2, which 6N does not count
    assert result["variants"]["ours_ltdr"]["mfu_needed"] > result["variants"]["ours_ltdr"]["mfu_six_n"]
    assert "Triton" in result["unavailable"]["deepspeed_dropless_grouped"]
    text = page.read_text()
    assert all(row["label"] in text for row in result["variants"].values())
    assert "deepspeed_dropless_grouped" in text


def test_both_types_add_a_suffix_to_bf16_alone(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "layer.json"
    assert bench.command.main([*TINY, "--dtype", "both", "--variants", "ours", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["variants"]
    assert {name: row["dtype"] for name, row in rows.items()} == {
        "dense": "fp32",
        "ours": "fp32",
        "dense_bf16": "bf16",
        "ours_bf16": "bf16",
    }


def test_figure_traces_and_tables_are_written(bench: Bench, tmp_path: Path) -> None:
    png, folder = tmp_path / "a" / "layer.png", tmp_path / "traces"
    arguments = [*TINY, "--dtype", "both", "--variants", "ours", "--png", str(png), "--profile", str(folder)]
    assert bench.command.main(arguments) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    names = ["dense", "dense_bf16", "ours", "ours_bf16"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        name + suffix for name in names for suffix in (".json", ".md")
    )
    events = json.loads((folder / "ours.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    table = (folder / "dense.md").read_text()
    # three products forward and six backward, each pass
    assert "| `aten::mm` |" in table
    assert table.split("| `aten::mm` |")[1].split("\n")[0].endswith("| 9 |")


def test_allocations_by_hand(bench: Bench, import_tool: Import) -> None:
    class Known(nn.Module):
        def forward(self, x_BSD: Tensor) -> Tensor:
            return x_BSD.exp().exp()

    counts = import_tool("bench.counts").count_pass(Known(), problem_of(bench))
    # each exp makes its result forward, and backward a product that is its input's gradient
    assert counts.allocations == 4
    assert counts.host_syncs is counts.kernels is None


def test_a_rival_that_is_too_large_is_left_out(bench: Bench, capsys: pytest.CaptureFixture) -> None:
    class Huge(nn.Module):
        def forward(self, x_BSD: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("too much\nand more")

    layers = {"ours": nn.Identity(), "rival": Huge()}
    reasons = bench.measure.drop_too_large(layers, problem_of(bench), kept={"ours"})
    assert reasons == {"rival": "too little memory: too much"}
    assert list(layers) == ["ours"]
    with pytest.raises(torch.OutOfMemoryError):
        bench.measure.drop_too_large({"ours": Huge()}, problem_of(bench), kept={"ours"})


def test_a_peak_that_is_given_is_taken(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "layer.json"
    arguments = [*TINY, "--dtype", "bf16", "--variants", "ours", "--peak-tflops", "0.5", "--json", str(out)]
    assert bench.command.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["config"]["peaks"] == {"bf16": {"tflops": 0.5, "source": "given"}}
    assert result["variants"]["ours"]["mfu_needed"] == pytest.approx(result["variants"]["ours"]["tflops"] / 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "both", "--peak-tflops", "5"], "--peak-tflops: a peak is one type's"),
        (["--dtype", "fp32", "--peak-tflops", "0"], "0; allowed: a number above 0"),
    ],
)
def test_a_wrong_peak_ends_with_status_2(
    bench: Bench, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.command.main([*TINY, *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (6, 3)])
def test_all_variants_compute_the_same_function(bench: Bench, experts: int, top_k: int) -> None:
    """Forward outputs against each other, with the same weights, beside the tool's own check."""
    problem = problem_of(bench, experts=experts, top_k=top_k).with_capacity(float(experts))
    outputs: dict[str, list[Tensor]] = {"top_k": [], "ltdr": [], "dynamic": []}
    for variant in bench.variants.VARIANTS:
        if variant.name not in OURS | RIVALS:
            continue
        outputs[variant.computes].append(variant.build(problem).train()(problem.x_BSD).detach())
    assert {kind: len(values) for kind, values in outputs.items()} == {"top_k": 7, "ltdr": 2, "dynamic": 1}
    for values in outputs.values():
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], atol=1e-4, rtol=0)
    # the tail's tokens, and only they, are routed otherwise
    is_changed_T = (outputs["top_k"][0] - outputs["ltdr"][0]).abs().amax(dim=-1)[0] > 1e-4
    assert int(is_changed_T.sum()) == round(0.13 * 64)


def test_a_wrong_variant_is_not_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Halved(bench.layers.Ours):  # type: ignore[name-defined]
        def forward(self, x_BSD: Tensor) -> Tensor:
            return super().forward(x_BSD) * 0.5

    right = next(variant for variant in bench.variants.VARIANTS if variant.name == "ours")

    def build(problem: object) -> nn.Module:
        layer = right.build(problem)
        layer.__class__ = Halved
        return layer

    wrong = bench.variants.Variant(name="ours", label="wrong", build=build, computes="top_k", is_ours=True)
    monkeypatch.setattr(bench.command, "choose", lambda names: (bench.variants.VARIANTS[0], wrong))
    assert bench.command.main([*TINY, "--dtype", "fp32"]) == 1
    assert "check failed: ours: output is off" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.0, 0.02, 0.13, 0.3])
def test_the_tail_has_exactly_its_share(bench: Bench, share: float) -> None:
    problem = problem_of(bench, tokens=500, tail_share=share)
    probs_TE = torch.softmax(problem.x_BSD[0] @ problem.gate_ED.T, dim=-1)
    is_vision_T = problem.context.modality_BS[0] == 2
    if not share:
        assert not is_vision_T.any()
        return
    # LTDR eq. 9 and 11 by hand
    variance_T = ((probs_TE - 1 / 4) ** 2).mean(dim=-1)
    is_tail_T = is_vision_T & (variance_T > variance_T[is_vision_T].mean())
    assert int(is_tail_T.sum()) == round(share * 500)


def test_a_tail_that_cannot_be_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match=r"tail_share: no choice .* exactly 4 in the tail"):
        problem_of(bench, tokens=4, tail_share=0.99)


def test_capacity_drops_are_counted(bench: Bench) -> None:
    """A gate that sends every token to experts 0 and 1: each may take capacity * k * T / E of the T that want it."""
    problem = problem_of(bench, tokens=64)
    problem.x_BSD.abs_()
    problem.gate_ED.copy_(torch.tensor([2.0, 1.0, -1.0, -2.0])[:, None].expand(4, 32))
    for name in ("deepspeed_capacity", "deepspeed_einsum"):
        variant = next(variant for variant in bench.variants.VARIANTS if variant.name == name)
        layer = variant.build(problem.with_capacity(1.0)).train()
        # capacity 1.0 * 2 * 64 / 4 = 32 rows for each of the two experts, which 64 tokens want each
        assert layer.count_dropped(problem.x_BSD) == 2 * (64 - 32)


def test_saved_bytes_are_counted_once_and_without_parameters(bench: Bench) -> None:
    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32, 32))

        def forward(self, x_BSD: Tensor) -> Tensor:
            # both products save x (once), exp saves its result; the weight is a parameter
            return (x_BSD @ self.weight + x_BSD @ self.weight.t()).exp()

    problem = problem_of(bench)
    assert bench.measure.saved_mib(Known(), problem) == pytest.approx(2 * 64 * 32 * 4 / 2**20)


def test_ratio_and_spread_by_hand(bench: Bench) -> None:
    floor = [1.0, 2.0, 1.0, 2.0, 1.0]
    # ratios 1.0, 1.1, 1.2, 1.3, 1.4: median 1.2; p10 = 1.04, p90 = 1.36
    seconds = [1.0, 2.2, 1.2, 2.6, 1.4]
    ratio, spread = bench.measure.ratio_and_spread(seconds, floor)
    assert ratio == pytest.approx(1.2)
    assert spread == pytest.approx((1.36 - 1.04) / 1.2)
    assert bench.measure.ratio_and_spread(floor, floor)[0] == 1.0


def test_ctrl_c_keeps_the_complete_rounds(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, calls = bench.measure.run_once, []

    def run_once(layer: nn.Module, problem: object, clock: Callable[[], float]) -> float:
        calls.append(layer)
        if len(calls) == 6:  # within the third round of two layers
            raise KeyboardInterrupt
        return real(layer, problem, clock)

    monkeypatch.setattr(bench.measure, "run_once", run_once)
    out = tmp_path / "layer.json"
    status = bench.command.main([*TINY, "--repeats", "9", "--dtype", "fp32", "--variants", "ours", "--json", str(out)])
    assert status == 130
    result = json.loads(out.read_text())
    assert result["config"]["rounds"] == 2
    assert set(result["variants"]) == {"dense", "ours"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "ours,tutel"], "--variants: tutel; allowed: dense, ours"),
        (["--top-k", "5"], "top_k: 5; allowed: 1 to experts (4)"),
        (["--tail-share", "1.5"], "tail_share: 1.5; allowed: 0 to below 1"),
        (["--tokens", "0"], "tokens: 0; allowed: 1 and above"),
    ],
)
def test_wrong_options_are_named(
    bench: Bench, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert bench.command.main([*TINY, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
