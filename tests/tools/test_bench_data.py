"""The data benchmark: its form, what it counts and makes. No time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from moe_lvlm.config.load import load_recipe
from moe_lvlm.data.order import StepOrder
from moe_lvlm.data.sample import process_image
from moe_lvlm.training.build import run_processor
from tests.tiny_run import write_run_inputs
from tests.tools.conftest import Import

QUICK = ["--micro-batches", "2", "--repeats", "1", "--steps", "2"]


class Bench(NamedTuple):
    command: ModuleType
    costs: ModuleType
    loaders: ModuleType
    synthetic: ModuleType


@pytest.fixture(scope="module")
def bench(import_tool: Import) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    names = ("costs", "loaders", "synthetic")
    yield Bench(import_tool("bench_data"), *(import_tool(f"bench.data_{name}") for name in names))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 records, every fifth without an image; steps of 4 micro-batches of 2."""
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


def test_json_and_page(bench: Bench, recipe: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "deep" / "d.json", tmp_path / "d.md"
    arguments = [str(recipe), "data.max_length=60", "--workers", "1,0", "--batchings", "padded,packed_balanced"]
    files = ["--json", str(out), "--markdown", str(page)]
    assert bench.command.main([*arguments, "--need", "10", *QUICK, *files]) == 0
    result = json.loads(out.read_text())
    assert result["config"]["ranks"] == 4 and result["config"]["rounds"] == 1
    assert set(result["costs"]) == {
        "decode", "process", "resize", "process_lookup", "text", "sample", "collate",
    }  # fmt: skip
    assert all(cost["milliseconds"] > 0 for cost in result["costs"].values())
    assert set(result["batches"]) == {"padded", "padded_grouped", "packed", "packed_balanced"}
    assert result["batches"]["packed"]["padding"] == 0 < result["batches"]["padded"]["padding"]
    assert list(result["loaders"]) == ["padded_0", "padded_1", "packed_balanced_0", "packed_balanced_1"]
    for row in result["loaders"].values():
        assert row["need_factor"] == pytest.approx(row["samples_per_second"] / 10)
        assert row["bad"] == 0
    # the same micro-batches whatever the number of workers
    for name in ("padded", "packed_balanced"):
        rows = [result["loaders"][f"{name}_{workers}"] for workers in (0, 1)]
        shares = [row["tokens_per_second"] / row["samples_per_second"] for row in rows]
        assert shares[0] == pytest.approx(shares[1])
    assert "| packed, balanced | 1 |" in page.read_text()


def test_what_a_loader_run_counts(bench: Bench, recipe: Path) -> None:
    """Micro-batches 2 and 3 of rank 1 of 1, behind the first: by hand from the order's draws."""
    opened = load_recipe(recipe)
    data = bench.loaders.open_stage(opened, 1, run_processor(opened), bench.loaders.BATCHINGS[0], None)
    run = bench.loaders.LoaderRun(data, ranks=1, workers=0, skipped=1, micro_batches=2)
    assert run.seconds() > 0
    samples = [data.dataset[draw] for draws in data.order.step(0)[1:3] for draw in draws]
    assert run.samples == len(samples) == 4
    assert run.tokens == sum(len(sample.input_ids) for sample in samples)
    assert run.images == sum(len(sample.image_tokens) for sample in samples)
    first = run.tokens
    run.seconds()
    assert run.tokens == first  # not added up over rounds


def test_waste_by_hand(bench: Bench) -> None:
    order = StepOrder(seed=0, epoch_size=4, micro_batch=2, global_batch=4)
    lengths = dict(zip(order.draws(0), (4, 1, 3, 2), strict=True))
    data = SimpleNamespace(order=order, dataset=SimpleNamespace(length=lengths.__getitem__))
    found = bench.loaders.measure_waste(data, steps=1, ranks=2)
    # (4, 1) and (3, 2): 8 and 6 positions for 10 tokens; by length (4, 3) and (2, 1): 8 and 4
    assert found["padded"] == pytest.approx((1 - 10 / 14, 8 * 2 / 14))
    assert found["padded_grouped"] == pytest.approx((1 - 10 / 12, 8 * 2 / 12))
    assert found["packed"] == pytest.approx((0, 1))
    assert found["packed_balanced"] == pytest.approx((0, 1))


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),
        CLIPImageProcessorPil(size={"height": 24, "width": 36}, crop_size={"height": 24, "width": 36}),
        SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    ],
)
def test_the_lookup_gives_equal_pixels(bench: Bench, processor: object) -> None:
    generator = np.random.default_rng(0)
    holder = SimpleNamespace(image_processor=processor)
    lookup = bench.costs.LookupProcessor(holder)
    for size in ((97, 61, 3), (40, 40, 3), (33, 120, 3)):
        image = Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8))
        assert torch.equal(lookup(image), process_image(holder, image))


def test_synthetic_data_are_like_llavas(bench: Bench, tmp_path: Path) -> None:
    given = bench.synthetic.write_data(tmp_path / "data", num_images=8, num_records=300, seed=0)
    for file in (tmp_path / "data" / "images").iterdir():
        with Image.open(file) as image:
            assert image.size == (640, 480) and image.format == "JPEG"
        assert 50_000 < file.stat().st_size < 250_000
    opened = load_recipe(bench.command.SYNTHETIC, given)
    processor, batchings = run_processor(opened), {one.name: one for one in bench.loaders.BATCHINGS}
    plain = bench.loaders.open_stage(opened, 0, processor, batchings["packed"], None)
    lengths = [plain.dataset.length(draw) for step in (0, 1) for draw in plain.order.draws(step)]
    assert np.mean(lengths) == pytest.approx(0.94 * 576 + 190, rel=0.1)
    cached = bench.loaders.open_stage(opened, 0, processor, batchings["cached"], str(tmp_path / "data" / "features"))
    draws = plain.order.draws(0)[:4]
    for one, other in ((plain.dataset[draw], cached.dataset[draw]) for draw in draws):
        assert torch.equal(one.input_ids, other.input_ids)
        if one.pixel_values is not None:
            assert one.pixel_values.shape == (1, 3, 336, 336) and other.image_features.shape == (1, 576, 1024)


def test_synthetic_command(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "d.json"
    arguments = [
        "--synthetic",
        "--images",
        "4",
        "--records",
        "40",
        "stages.0.micro_batch=2",
        "stages.0.global_batch=4",
        "--workers",
        "0",
    ]
    assert bench.command.main([*arguments, "--batchings", "packed,cached", *QUICK, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["loaders"]) == {"packed_0", "cached_0"} and result["config"]["is_synthetic"]


def test_ctrl_c_keeps_the_complete_rounds(
    bench: Bench, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = bench.loaders.LoaderRun.seconds, []

    def seconds(run: object) -> float:
        calls.append(run)
        if len(calls) == 4:  # within the second round of two loaders
            raise KeyboardInterrupt
        return real(run)

    monkeypatch.setattr(bench.loaders.LoaderRun, "seconds", seconds)
    out = tmp_path / "d.json"
    arguments = [
        str(recipe),
        "--workers",
        "0",
        "--batchings",
        "padded,packed",
        "--repeats",
        "5",
        "--micro-batches",
        "1",
    ]
    assert bench.command.main([*arguments, "--json", str(out)]) == 130
    result = json.loads(out.read_text())
    assert result["config"]["rounds"] == 1 and set(result["loaders"]) == {"padded_0", "packed_0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "two"], "--workers: 'two'; allowed: whole numbers from 0"),
        (["--batchings", "packed,sorted"], "--batchings: sorted; allowed: padded, padded_grouped, packed"),
        (["--batchings", "cached"], "--batchings: cached, but the recipe has no data.feature_cache"),
        (["--ranks", "3"], "not a multiple of the 3 processes"),
        (["--stage", "align"], "align: no stage of recipe tiny; stages: tune, sparse"),
    ],
)
def test_wrong_options_are_named(
    bench: Bench, recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.command.main([str(recipe), *QUICK, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_synthetic_takes_no_recipe(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.command.main(["--synthetic", "quickstart"])
    assert ended.value.code == 2
    assert "--synthetic makes its own data; leave quickstart out" in capsys.readouterr().err
