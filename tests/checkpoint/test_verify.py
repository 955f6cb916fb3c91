"""Every flipped bit and every truncation is seen, and what a checkpoint says has to fit together."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from moe_lvlm.checkpoint.consistency import index_contradictions, state_contradictions
from moe_lvlm.checkpoint.layout import Index, Range, read_json
from moe_lvlm.checkpoint.reshard import reshard
from moe_lvlm.checkpoint.verify import are_finite, file_problems, in_threads, read_manifest, verify
from tests.checkpoint.trainings import TRAIN_STATE, save_one, stepped


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several files."""
    folder = tmp_path_factory.mktemp("whole")
    source = save_one(folder, "one", stepped(), state=TRAIN_STATE)
    return reshard(source, folder, "three", num_files=3).path


def record(path: Path, name: str) -> None:
    """Make the manifest say what a file holds now."""
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / name).read_bytes()
    manifest["files"][name] = {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def undetected(path: Path, count: int, seed: int, judge: Callable[[Path], list[str]]) -> list[str]:
    """Damage a folder so many times, each time somewhere else, and mend it again; the damages that nobody saw."""
    rng = random.Random(seed)
    files = sorted(path.iterdir())
    unseen = []
    for number in range(count):
        file = files[number % len(files)]
        before = file.read_bytes()
        if rng.random() < 0.7:
            place, bit = rng.randrange(len(before)), rng.randrange(8)
            damaged, what = bytearray(before), f"bit {bit} of byte {place} of {file.name}"
            damaged[place] ^= 1 << bit
        else:
            length = rng.randrange(len(before))
            damaged, what = bytearray(before[:length]), f"{file.name} ends after {length} of {len(before)} bytes"
        file.write_bytes(damaged)
        if not judge(path):
            unseen.append(what)
        file.write_bytes(before)
    assert judge(path) == []
    return unseen


def test_random_damage_is_seen(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "c")
    assert undetected(tmp_path / "c", 300, 0, verify) == []


@pytest.mark.slow
def test_a_thousand_random_damages_are_seen(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "c")
    assert undetected(tmp_path / "c", 1000, 1, verify) == []


def test_every_bit_of_the_manifest_counts(whole: Path, tmp_path: Path) -> None:
    """Nothing records the manifest's own checksum: what it says must be redundant."""
    path = tmp_path / "c"
    shutil.copytree(whole, path)
    before = (path / "manifest.json").read_bytes()
    for place in range(0, len(before), 11):
        for bit in range(8):
            damaged = bytearray(before)
            damaged[place] ^= 1 << bit
            (path / "manifest.json").write_bytes(damaged)
            assert verify(path) != [], (place, bit)


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rng-00000.safetensors", "state.json"])
def test_a_file_that_the_manifest_forgot(whole: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "c"
    shutil.copytree(whole, path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(path)
    assert name in problem and ("not named by manifest.json" in problem or "does not name" in problem)


def test_sizes_alone(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(whole, path)
    data = bytearray((path / "rank-00001.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "rank-00001.safetensors").write_bytes(data)
    assert verify(path, is_hashed=False) == []
    (path / "rank-00001.safetensors").write_bytes(data[:-1])
    assert "manifest.json says" in verify(path, is_hashed=False)[0]


def test_all_bytes_are_told_of_and_problems_keep_their_order(whole: Path) -> None:
    advanced: list[int] = []
    assert verify(whole, advance=advanced.append) == []
    listed = sum(file.stat().st_size for file in whole.iterdir() if file.name != "manifest.json")
    assert sum(advanced) == listed
    files = {name: {"size": one["size"], "xxh3_128": "0" * 32} for name, one in read_manifest(whole).items()}
    for num_threads in (1, 4):
        problems = file_problems(whole, files, num_threads=num_threads, where="elsewhere.json")
        assert [problem.partition(":")[0] for problem in problems] == [str(whole / name) for name in files]
        assert all("elsewhere.json says 000" in problem for problem in problems)


def test_a_file_that_cannot_be_read(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moe_lvlm.checkpoint.verify.hash_file", failing)
    problems = verify(whole)
    assert len(problems) == len(read_manifest(whole))
    assert all("cannot be read: Input/output error" in problem for problem in problems)


def test_threads_end_when_one_fails() -> None:
    def work(number: int, advance: Callable[[int], None]) -> int:
        if number == 0:
            raise KeyError("first")
        for _ in range(10**9):  # would run for minutes
            advance(1)
        return number

    with pytest.raises(KeyError, match="first"):
        in_threads(work, [0, 1, 2], advance=lambda num_bytes: None, num_threads=3)


def test_finite_sums_and_others() -> None:
    big = torch.full((100,), 3e38)  # finite, its sum is not
    for values, expected in (
        (torch.randn(1000), True),
        (big, True),
        (torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([float("inf"), -float("inf"), 0.0]), False),
        (torch.full((70_000,), 60_000.0, dtype=torch.float16), True),
        (torch.zeros(0), True),
    ):
        piece = Range(0, len(values), "", "")
        found = are_finite(lambda start, stop, values=values: values[start:stop], piece, lambda num_bytes: None)
        assert found is expected, values


# ---- what fits together


def entry(dtype: str = "F32", shape: list[int] | None = None, step: float | None = None) -> dict[str, Any]:
    shape = [4] if shape is None else shape
    size = 1
    for one in shape:
        size *= one
    data: dict[str, Any] = {"dtype": dtype, "shape": shape, "ranges": [[0, size, "rank-00000.safetensors", "k"]]}
    return data if step is None else data | {"step": step}


def index_of(**tensors: Any) -> Index:
    return Index.from_json({"format_version": 1, "tensors": tensors}, Path("index.json"))


MOMENTS = {"exp_avg": entry(step=3.0), "exp_avg_sq": entry(step=3.0)}


@pytest.mark.parametrize(
    ("kinds", "problem"),
    [
        ({"master": entry(), **MOMENTS}, None),
        ({"master": entry()}, None),
        ({"weight": entry("BF16")}, None),
        ({"weight": entry(), "master": entry()}, "has master, weight; allowed: a weight, or a master"),
        ({}, "has nothing"),
        (MOMENTS, "has exp_avg, exp_avg_sq; allowed"),
        ({"weight": entry(), **MOMENTS}, "has exp_avg, exp_avg_sq without a master"),
        ({"master": entry(), "exp_avg": entry(step=1.0)}, "exp_avg alone"),
        ({"master": entry("BF16"), **MOMENTS}, "master is bfloat16, must be float32"),
        ({"master": entry(), **MOMENTS, "exp_avg": entry("BF16", step=3.0)}, "exp_avg is bfloat16"),
        ({"master": entry(shape=[2, 2]), **MOMENTS}, r"has shapes [2, 2] (master), [4] (exp_avg)"),
        ({"master": entry(), **MOMENTS, "exp_avg": entry()}, "moments have steps ['3.0', 'None']"),
        ({"master": entry(), **MOMENTS, "exp_avg": entry(step=4.0)}, "moments have steps ['3.0', '4.0']"),
        ({"master": entry(), "exp_avg": entry(step=-1.0), "exp_avg_sq": entry(step=-1.0)}, "step is -1.0"),
        ({"master": entry(step=1.0)}, "has a step without being a moment"),
    ],
)
def test_kinds_of_a_tensor(kinds: dict[str, Any], problem: str | None) -> None:
    found = index_contradictions(index_of(w=kinds))
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith("index.json: w: ") and problem in found[0]


GOOD = TRAIN_STATE | {"saved_world_size": 2, "learning_rates": {"w": 0.1}, "engine": {}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"global_step": "3"}, "global_step is '3'; allowed: a whole number"),
        ({"global_step": True}, "global_step is True"),
        ({"samples": -1}, "samples is -1"),
        ({"world_size": 0}, "world_size is 0; allowed: a whole number, 1 and above"),
        ({"is_stage_done": 1}, "is_stage_done is 1; allowed: true, false"),
        ({"step": 4}, "step is 4, more than the whole run's global_step (3)"),
        ({"engine": None}, "engine is None"),
        ({"learning_rates": None}, "learning_rates is None"),
        ({"learning_rates": {"w": "0.1"}}, "learning_rates: w has '0.1'"),
        ({"learning_rates": {"w": float("inf")}}, "learning_rates: w has inf"),
        ({"learning_rates": {}}, "learning_rates: w is missing"),
        ({"learning_rates": {"w": 0.1, "v": 0.1, "u": 0.1}}, "learning_rates: u is not trained, and 1 more"),
        ({"saved_world_size": 3}, "saved_world_size is 3, the random generators of 2 ranks are there"),
        ({"has_optimizer": False}, "has_optimizer is false, but 1 tensors have a master"),
    ],
)
def test_state(change: dict[str, Any], problem: str | None) -> None:
    index = index_of(w={"master": entry()}, f={"weight": entry()})
    found = state_contradictions(GOOD | change, index, num_generators=2)
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith("state.json: ") and problem in found[0]


def test_what_we_write_fits_together(whole: Path) -> None:
    index = Index.from_json(read_json(whole / "index.json"), whole)
    assert index_contradictions(index) == []
    assert state_contradictions(read_json(whole / "state.json"), index, num_generators=1) == []
