"""The script export.py: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.tools.conftest import TOOLS, Import
from tests.trained_run import write_trained_run


@pytest.fixture(scope="module")
def tool(import_tool: Import) -> ModuleType:
    return import_tool("export")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("trained"))


def test_auto_is_native_with_a_report(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert tool.main(["model", str(run), str(target), "--eea-samples", "3", "--max-shard-size", "100kB"]) == 0
    printed = capsys.readouterr().out
    assert "form: native; loads with trust_remote_code=True as MoELlavaForConditionalGeneration" in printed
    assert "not stock: router ltdr with EEA" in printed
    assert "vision tokens in the tail" in printed and "answers that differ" in printed
    assert "compared with the trained model: logits differ by at most 0 " in printed
    assert json.loads((target / "eea_report.json").read_text())["samples"] == 3
    card = (target / "README.md").read_text()
    assert "Measured on 3 samples" in card and "| color | 0.500 | 0.250 | 4 |" in card


def test_stock_carries_the_report(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    arguments = ["model", str(run), str(target), "--format", "stock", "--without-eea", "--eea-samples", "2"]
    assert tool.main([*arguments, "--license", "apache-2.0"]) == 0
    assert (
        "plain transformers loads it as LlavaForConditionalGeneration around Qwen2MoeModel" in capsys.readouterr().out
    )
    assert (target / "eea_report.json").is_file()
    card = (target / "README.md").read_text()
    assert "EEA is switched off in this export" in card and "license: apache-2.0" in card
    assert tool.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert tool.main([*arguments, "--overwrite", "--eea-samples", "0", "--no-check"]) == 0
    assert "not compared with the trained model: as asked for" in capsys.readouterr().out
    assert not (target / "eea_report.json").exists()


def test_a_dry_run_writes_nothing(
    tool: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["model", str(run), str(tmp_path / "out"), "--dry-run", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "dry run: nothing was written" in printed and "as bfloat16 in 1 file(s)" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "stock"], "error: router ltdr with EEA"),
        (["--format", "stock", "--without-eea", "--records", "none.json"], "none.json"),
        (["--device", "nowhere"], "device: 'nowhere'"),
    ],
)
def test_mistakes(
    tool: ModuleType,
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tool.main(["model", str(run), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--dtype", "int8"], ["--max-shard-size", "0"], ["--eea-samples", "-1"]])
def test_what_the_command_line_refuses(tool: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main(["model", "run", "out", *arguments])


def test_as_a_command() -> None:
    command = [sys.executable, str(TOOLS / "export.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python tools/export.py model runs/quickstart" in done.stdout
