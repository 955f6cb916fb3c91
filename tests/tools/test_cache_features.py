"""tools/cache_features.py: what it computes, keeps, skips and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from moe_lvlm.config.load import load_recipe
from moe_lvlm.data.features import FeatureCache
from moe_lvlm.data.images import load_image
from moe_lvlm.models.build import build_dense
from tests.tiny_run import write_run_inputs
from tests.tools.conftest import TOOLS, Import

IMAGES = 32  # of 40 records every fifth has none
ROOT = TOOLS.parent


@pytest.fixture(scope="module")
def tool(import_tool: Import) -> ModuleType:
    return import_tool("cache_features")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_run_inputs(tmp_path / "data")


def change(path: Path, **sections: dict[str, Any]) -> None:
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(recipe | {name: recipe[name] | values for name, values in sections.items()}))


def opened(recipe: Path, out: Path) -> FeatureCache:
    return FeatureCache(out, base=recipe.parent)


def expected_features(recipe: Path) -> dict[str, torch.Tensor]:
    """By the path of each image, from transformers' own CLIP, all images in one batch: the last but one hidden state
    without the class token."""
    model, processor = build_dense(load_recipe(recipe).model, seed=0)
    records = json.loads((recipe.parent / "train.json").read_text())
    paths = [record["image"] for record in records if "image" in record]
    images = [load_image(recipe.parent, path) for path in paths]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower.eval()(pixels, output_hidden_states=True).hidden_states
    return dict(zip(paths, states[-2][:, 1:], strict=True))


def test_features_are_the_towers(
    tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    assert tool.main([str(recipe), "--out", str(out), "--device", "cpu", "data.num_workers=0"]) == 0
    printed = capsys.readouterr().out
    # 16 x 16 pixels in patches of 8, 32 wide, 4 bytes
    assert f"{IMAGES} images, 0 of them done; 4 x 32 features in fp32: 16.4 kB to write in {out}\n" in printed
    assert f"wrote {out}: {IMAGES} images in all, " in printed
    assert f"data.feature_cache={out}\n" in printed
    cache, expected = opened(recipe, out), expected_features(recipe)
    assert len(cache) == len(expected) == IMAGES
    for path, features in expected.items():
        assert torch.equal(cache.read(recipe.parent, path), features), path

    # nothing is done twice
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert tool.main([str(recipe), "--out", str(out)]) == 0
    assert f"{IMAGES} images, {IMAGES} of them done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == shards
    assert tool.main([str(recipe), f"data.feature_cache={out}"]) == 0


def test_batches_change_nothing_but_rounding_and_types_are_kept(
    tool: ModuleType, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "SHARD_IMAGES", 8)
    expected = expected_features(recipe)
    for dtype, kind, tolerance in (("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 8e-3)):
        out = tmp_path / dtype
        assert tool.main([str(recipe), "--out", str(out), "--batch", "3", "--workers", "1", "--dtype", dtype]) == 0
        cache = opened(recipe, out)
        assert len(list(out.glob("*.safetensors"))) == 4
        for path, features in expected.items():
            found = cache.read(recipe.parent, path)
            assert found.dtype == kind
            torch.testing.assert_close(found.float(), features, rtol=tolerance, atol=tolerance)
    # by default as the run computes
    assert tool.main([str(recipe), "train.precision=bf16", "--out", str(tmp_path / "run")]) == 0
    assert opened(recipe, tmp_path / "run").read(recipe.parent, path).dtype == torch.bfloat16


def test_an_image_of_several_records_and_stages_is_done_once(
    tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((recipe.parent / "train.json").read_text())
    (recipe.parent / "twice.json").write_text(json.dumps(records[1:3] * 2 + [{}]))
    mixture = [{"path": "twice.json", "weight": 3.0}, {"path": str(recipe.parent / "twice.json"), "name": "again"}]
    settings = yaml.safe_load(recipe.read_text())
    settings["stages"][1]["mixture"] = mixture
    recipe.write_text(yaml.safe_dump(settings))
    out = tmp_path / "cache"
    assert tool.main([str(recipe), "--stage", "sparse", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 records are bad and left out" in printed
    assert len(opened(recipe, out)) == 2
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) < 2 * 4 * 32 * 4 + 4096
    # all stages: the others are added
    assert tool.main([str(recipe), "--out", str(out)]) == 0
    assert f"{IMAGES} images, 2 of them done" in capsys.readouterr().out
    assert len(opened(recipe, out)) == IMAGES


# Eight images a shard; at the third shard's fsync this happens, before it has its name.
CHILD = """
import os, signal, sys
sys.path.insert(0, {tools!r})
import cache_features
cache_features.SHARD_IMAGES = 8
left, fsync = 3, os.fsync
def counted(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.{name})
    fsync(descriptor)
os.fsync = counted
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cache_features.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("name", "status"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130)])
def test_a_stopped_call_goes_on(
    tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, status: int
) -> None:
    out = tmp_path / "cache"
    code = CHILD.format(tools=str(TOOLS), name=name)
    command = [sys.executable, "-c", code, str(recipe), "--out", str(out), "--device", "cpu", "--batch", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert name != "SIGINT" or "interrupted; nothing was left half done" in done.stderr
    assert len(list(out.glob("*.safetensors"))) == 2
    left = list(out.glob(".*"))
    assert len(left) == (name == "SIGKILL")
    for scratch in left:
        os.utime(scratch, (time.time() - 7200,) * 2)
    with pytest.raises(
        ValueError, match=r"index\.json: no such file; .*the same call goes on with one that it has begun"
    ):
        opened(recipe, out)

    assert tool.main([str(recipe), "--out", str(out), "--batch", "4"]) == 0
    assert f"{IMAGES} images, 16 of them done" in capsys.readouterr().out
    assert list(out.glob(".*")) == []
    cache = opened(recipe, out)
    assert len(cache) == IMAGES
    for path, features in expected_features(recipe).items():
        torch.testing.assert_close(cache.read(recipe.parent, path), features, rtol=1e-5, atol=1e-5)


def test_parts(tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"
    for part, count in ((3, 10), (1, 21), (2, IMAGES)):
        assert tool.main([str(recipe), "--out", str(out), "--part", f"{part}/3"]) == 0
        assert f" of part {part}/3, 0 of them done" in capsys.readouterr().out
        assert len(opened(recipe, out)) == count


def test_bad_images_are_listed_and_done_when_mended(
    tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images = tmp_path / "cache", recipe.parent / "images"
    whole = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(whole[:60])
    (images / "2.png").unlink()
    assert tool.main([str(recipe), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        f"2 images cannot be used (listed in {out}); records with them will be bad samples\n  image 'images/1.png'"
        in printed
    )
    listed = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert [one["image"] for one in listed] == ["images/1.png", "images/2.png"]
    assert "cannot be read" in listed[0]["reason"]
    assert "is not a file" in listed[1]["reason"]
    assert len(opened(recipe, out)) == IMAGES - 2

    (images / "1.png").write_bytes(whole)
    shutil.copy(images / "3.png", images / "2.png")
    assert tool.main([str(recipe), "--out", str(out)]) == 0
    assert len(opened(recipe, out)) == IMAGES
    assert (out / "bad_images.jsonl").read_text() == ""


def test_a_dry_run_writes_nothing(
    tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(recipe), "--out", str(tmp_path / "cache"), "--dtype", "bf16", "--dry-run"]) == 0
    assert "4 x 32 features in bf16: 8.2 kB to write" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out: neither it nor the recipe's data.feature_cache is given; allowed: a folder"),
        (["--out", "made", "seed=1"], "holds features of another making: vision tower: weights is '"),
        (
            ["--out", "made", "--dtype", "bf16"],
            "features are fp32 (4, 32) in the cache, bf16 (4, 32) here; allowed: another",
        ),
        (["--out", "x", "stages.0.train=[vision_tower]"], "stage tune: train: vision_tower trains the vision tower"),
        (["--out", "x", "--stage", "align"], "align: no stage of recipe tiny"),
        (["--out", "x", "data.image_root=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_end_with_2(
    tool: ModuleType,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "made" in arguments:
        assert tool.main([str(recipe), "--out", "made"]) == 0
    capsys.readouterr()
    assert tool.main([str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_no_gpu_no_room_no_image(
    tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main([str(recipe), "--out", out, "--device", "cuda"]) == 2
    assert "--device: cuda, but torch sees no GPU; allowed: cpu" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert tool.main([str(recipe), "--out", out]) == 2
    assert "has 1.0 kB free, 16.4 kB are needed" in capsys.readouterr().err
    records = [one for one in json.loads((recipe.parent / "train.json").read_text()) if "image" not in one]
    (recipe.parent / "train.json").write_text(json.dumps(records))
    assert tool.main([str(recipe), "--out", out]) == 2
    assert "tiny: none of its records has an image; nothing to cache" in capsys.readouterr().err


def test_images_of_several_sizes_are_refused(
    tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, processor = build_dense(load_recipe(recipe).model, seed=0)
    processor.image_processor.do_resize = processor.image_processor.do_center_crop = False
    processor.image_processor.save_pretrained(tmp_path / "processor")
    tower = {"model_type": "dinov2", "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2}
    change(
        recipe,
        model={
            "vision_tower": {"from_config": tower | {"num_attention_heads": 2}},
            "image_processor": str(tmp_path / "processor"),
        },
    )
    assert tool.main([str(recipe), "--out", str(tmp_path / "one")]) == 0  # all are 16 x 16
    Image.new("RGB", (24, 16)).save(recipe.parent / "images" / "9.png")
    assert tool.main([str(recipe), "--out", str(tmp_path / "two")]) == 2
    message = capsys.readouterr().err
    assert "(16, 24) (images/9.png)" in message
    assert "not all of which make 4 features; allowed: an image processor with a fixed size or crop_size" in message


def test_no_image_can_be_read(
    tool: ModuleType, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (recipe.parent / "images").iterdir():
        path.write_bytes(b"")
    assert tool.main([str(recipe), "--out", str(tmp_path / "x")]) == 2
    assert f"none of the {IMAGES} images can be read: image 'images/1.png' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "a/b"])
def test_a_part_that_is_none(tool: ModuleType, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.parse_args(["recipe.yaml", "--part", part])
    assert ended.value.code == 2
    assert f"{part!r}; allowed: I/N with 1 <= I <= N, such as 3/8" in capsys.readouterr().err


def test_help_has_examples_and_sizes(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "python tools/cache_features.py quickstart --out cache/scenes" in text
    num_bytes = 576 * 1024 * 2
    assert f"{num_bytes / 1e6:.2f} MB in bf16" in text
    assert f"{num_bytes * 558_128 / 1e9:.0f} GB" in text
