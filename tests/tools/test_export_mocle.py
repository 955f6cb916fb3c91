"""`export.py mocle`: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.adapted_run import mocle_fields, write_adapted_blip, write_table
from tests.tools.conftest import Import


@pytest.fixture(scope="module")
def tool(import_tool: Import) -> ModuleType:
    return import_tool("export")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    write_table(folder / "clusters.safetensors")
    return write_adapted_blip(folder, mocle_fields(), data={"clusters": "clusters.safetensors"})


def test_adapters(tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    arguments = ["mocle", str(run), str(target), "--license", "apache-2.0"]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "InstructBlipForConditionalGeneration (instructblip-llama); trained connector: a file of its own" in printed
    assert "adapters: 4 for 4 rows of the gates, of rank 4 on 6 linear layers" in printed
    assert "compared with the trained model, 4 rows of the gates: logits differ by at most" in printed
    assert json.loads((target / "index.json").read_text())["base"]["name"] == "instructblip-llama"
    assert "license: apache-2.0" in (target / "README.md").read_text()
    assert tool.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    more = ["--overwrite", "--no-check", "--with-base", "--base", "some/base", "--dtype", "bfloat16"]
    assert tool.main([*arguments, *more]) == 0
    printed = capsys.readouterr().out
    assert "(written too); trained connector: in the base" in printed
    assert "not compared with the trained model: as asked for" in printed
    assert (target / "base" / "model.safetensors").is_file() and not (target / "connector.safetensors").exists()
    assert 'base_model: "some/base"' in (target / "README.md").read_text()


def test_a_merged_model(tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["mocle", str(run), str(tmp_path / "out"), "--merge", "3"]) == 0
    printed = capsys.readouterr().out
    assert "one InstructBlipForConditionalGeneration with cluster-003 merged" in printed
    assert "compared with the trained model: logits differ by at most" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_dry_run_writes_nothing(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["mocle", str(run), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_mistake(tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["mocle", str(run), str(tmp_path / "out"), "--merge", "17"]) == 2
    assert "error: merge: '17'; allowed: 0 to 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
