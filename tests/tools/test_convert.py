"""The command: what it says, what it writes, what it refuses, and that a run starts from the result."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_lvlm
from moe_lvlm.checkpoint.fragments import live_model
from moe_lvlm.checkpoint.ranks import SingleRank
from moe_lvlm.checkpoint.save import save_checkpoint
from moe_lvlm.config.load import load_recipe
from moe_lvlm.training.build import run_processor, stage_config
from tests.conversion.layouts import logits, tiny_vlm, write_original, write_tower
from tests.conversion.test_upcycling import write_dense
from tests.tiny_run import write_run_inputs
from tests.tools.conftest import TOOLS, Import

Command = Callable[..., int]


@pytest.fixture(scope="module")
def convert(import_tool: Import) -> Command:
    """The script's main."""
    script = import_tool("convert")
    return lambda *args: script.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("model") / "dense")


def test_there_and_back(convert: Command, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse, back = tmp_path / "sparse", tmp_path / "back"
    status = convert("upcycle", dense, "-o", sparse, "--experts", 8, "--top-k", 1, "--layers", "[0,2]", "balance.on=[]")
    assert status == 0
    out = capsys.readouterr()
    assert 'config: moe: null -> {"layers": [0, 2], "num_experts": 8, "top_k": 1' in out.out
    assert out.out.splitlines()[-1].endswith(f"the model is in {sparse}")
    assert "writing" in out.err
    loaded, _ = moe_lvlm.load(sparse)
    moe = loaded.config.moe_config
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.layers, moe.balance.on) == (8, 1, (0, 2), ())
    torch.testing.assert_close(logits(loaded), logits(tiny_vlm()), rtol=1e-5, atol=1e-5)

    assert convert("dense", sparse, "-o", back, "--plain", "--max-shard-size", "50KB") == 0
    assert len(list(back.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(moe_lvlm.load(back)[0]), logits(tiny_vlm()))


def test_dry_run(convert: Command, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = convert("upcycle", dense, "-o", tmp_path / "new", "--dry-run", "--dtype", "bfloat16", "--fine-grained", 2)
    assert status == 0
    out = capsys.readouterr().out
    weights = sum(parameter.numel() for parameter in tiny_vlm().parameters())
    # layers 0 and 2: 4 half experts instead of an FFN (3 x 32 x 48), and a gate (4 x 32); a token uses 2 of 4
    total = weights + 2 * (3 * 32 * 48 + 4 * 32)
    assert f"{2 * total:,} bytes in 1 file(s); {total:,} parameters, {weights + 2 * 4 * 32:,} of them activated" in out
    assert out.splitlines()[-1] == f"dry run: nothing was written to {tmp_path / 'new'}"
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_a_source_and_its_recipe_gives_the_experts(
    convert: Command, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = moe_lvlm.load(dense)
    processor.save_pretrained(tmp_path / "run" / "processor")
    save_checkpoint(
        tmp_path / "run" / "checkpoints",
        "tune-000001",
        live_model(model),
        config=model.config.to_dict(),
        state={"global_step": 1},
        rng={},
        ranks=SingleRank(),
        log=print,
    )
    recipe = write_run_inputs(tmp_path / "inputs")
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "checkpoints" / "tune-000001")):
        target = tmp_path / f"sparse-{number}"
        assert convert("upcycle", source, "-o", target, "--recipe", recipe, "router.tail_k=3", "--seed", 2) == 0
        loaded, _ = moe_lvlm.load(target)
        moe = loaded.config.moe_config
        assert moe is not None
        assert (moe.router.kind, getattr(moe.router, "tail_k", None)) == ("ltdr", 3)
    assert convert("upcycle", tmp_path / "run", "-o", target, "--recipe", recipe, "top_k=9", "--overwrite") == 2
    assert "override 'moe.top_k=9'" in capsys.readouterr().err


def test_parts_and_the_original_layout(convert: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("parts", "package:scenes/language_model", "package:scenes/tower", "--feature-layer", -1, "--seed", 3)
    assert convert(*parts, "-o", tmp_path / "scenes", "--dtype", "float32") == 0
    assert moe_lvlm.load(tmp_path / "scenes")[0].config.vision_feature_layer == -1

    model = tiny_vlm()
    tower = write_tower(tmp_path / "clip", model)
    folder = write_original(tmp_path / "llava", model, tower=Path("openai/clip"))
    assert convert("llava", folder, "-o", tmp_path / "ours") == 2
    assert "say where it is, --vision-tower" in capsys.readouterr().err
    assert convert("llava", folder, "-o", tmp_path / "ours", "--vision-tower", tower) == 0
    assert "note: image_aspect_ratio: pad" in capsys.readouterr().out
    assert torch.equal(logits(moe_lvlm.load(tmp_path / "ours")[0]), logits(model))
    assert convert("moe-llava", folder, "-o", tmp_path / "sparse", "--vision-tower", tower) == 2
    assert "model_type 'llava_llama'; allowed: moe_llava_llama" in capsys.readouterr().err


def test_targets(convert: Command, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An existing folder stays unless it is asked for, and one of another program's stays in any case."""
    target = tmp_path / "sparse"
    assert convert("upcycle", dense, "-o", target) == 0
    assert convert("upcycle", dense, "-o", target) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert("upcycle", dense, "-o", target, "--overwrite", "--experts", 2) == 0
    assert moe_lvlm.load(target)[0].config.moe["num_experts"] == 2
    copied = shutil.copytree(dense, tmp_path / "foreign")
    assert convert("upcycle", dense, "-o", copied, "--overwrite") == 2
    assert "was not written by this program" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--experts", "3", "--top-k", "4"], "top_k: 4 is above num_experts (3)"),
        (["--router", "best"], "router: "),
        (["expert=4"], "did you mean"),
    ],
)
def test_settings(
    options: list[str],
    message: str,
    convert: Command,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert("upcycle", dense, "-o", tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_run_starts_from_the_result(convert: Command, tmp_path: Path) -> None:
    """The recipe's `model.from_pretrained`: the stage's configuration and the processor come from the folder."""
    parts = ("parts", "package:scenes/language_model", "package:scenes/tower", "--feature-layer", -1)
    assert convert(*parts, "-o", tmp_path / "scenes", "--dtype", "float32") == 0
    recipe = load_recipe(
        "quickstart",
        [f"model={{from_pretrained: {tmp_path / 'scenes'}}}", "parallel.expert_parallel_size=1"],
    )
    last = len(recipe.stages) - 1
    assert stage_config(recipe, 0).moe is None
    assert stage_config(recipe, last).moe_config == recipe.moe
    assert run_processor(recipe).image_token == "<image>"


def test_help() -> None:
    """As a process of its own: the docstring is the help, and every command has one."""
    result = subprocess.run(
        [sys.executable, str(TOOLS / "convert.py"), "upcycle", "--help"], capture_output=True, text=True, check=True
    )
    assert "key=value" in result.stdout
    assert "--fine-grained" in result.stdout
