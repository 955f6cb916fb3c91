"""tools/verify.py: what it prints, its exit status, its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from moe_lvlm.checkpoint.model_folder import write_model_folder
from moe_lvlm.checkpoint.source import LazySource, LazyTensor
from moe_lvlm.config.moe import MoEConfig
from tests.tiny_models import tiny_moe_llava
from tests.tools.conftest import Import


@pytest.fixture(scope="module")
def tool(import_tool: Import) -> ModuleType:
    return import_tool("verify")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_moe_llava(MoEConfig(num_experts=4, top_k=2))
    tensors = {name: LazyTensor.of(parameter.detach()) for name, parameter in model.named_parameters()}
    documents = {"config.json": model.config.to_json_string().encode()}
    return write_model_folder(tmp_path / "model", LazySource(tensors), documents=documents).path


def damage(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def test_a_whole_folder(tool: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(folder), str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count(f"{folder}: model folder, well (all of it; 3 files") == 1
    assert tool.main(["--quick", str(folder)]) == 0
    assert "well (sizes and structure; 3 files" in capsys.readouterr().out


def test_a_damaged_one(tool: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder)
    out = tmp_path / "deep" / "verdicts.json"
    assert tool.main([str(folder), "--json", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: model folder, 1 problem"
    assert lines[1].startswith(f"  {folder / 'model.safetensors'}: xxh3-128 is ")
    (verdict,) = json.loads(out.read_text())
    assert verdict["path"] == str(folder)
    assert verdict["form"] == "model folder"
    assert len(verdict["problems"]) == 1
    assert tool.main(["--quick", str(folder)]) == 0  # a flipped bit is what --quick does not see


def test_mistakes_in_the_arguments(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path / "missing")]) == 2
    assert "error: " in (err := capsys.readouterr().err) and "no such folder; allowed: a checkpoint" in err
    assert tool.main([str(tmp_path)]) == 2
    assert "has nothing; allowed" in capsys.readouterr().err


def test_help_has_an_example_and_loads_nothing(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tool.main(["--help"])
    assert end.value.code == 0
    assert "python tools/verify.py runs/quickstart" in capsys.readouterr().out
