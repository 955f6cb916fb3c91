"""The command: quick help, mistakes with exit status 2, and what reaches the handlers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_lvlm import cli

COMMANDS = ["train", "eval", "report", "chat", "recipes", "submit", "status", "logs", "preflight"]


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_lvlm", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
        cwd=Path(__file__).resolve().parents[1],
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Calls of the functions behind the commands, which need torch and are tested in their own rooms."""
    seen: list[tuple[object, ...]] = []

    def put(module: str, function: str, result: object = None) -> None:
        def record(*positional: object, **named: object) -> object:
            seen.append((function, *positional, named))
            return result

        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: record}))

    put("moe_lvlm.training.run", "train")
    put("moe_lvlm.training.dry_run", "describe", "described")
    put("moe_lvlm.evaluation.runner", "evaluate", {})
    put("moe_lvlm.evaluation.chat", "chat")
    put("moe_lvlm.analysis.report", "write_report", Path("r/report/index.html"))
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert "example:" in capsys.readouterr().out


def test_help_and_import_need_no_torch() -> None:
    code = (
        "import sys, moe_lvlm, moe_lvlm.cli; moe_lvlm.cli.build_parser(); "
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'pydantic', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["train", "quickstrt"], "'quickstart'"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "quickstart", "trian.precision=fp32"], "trian"),
        (["train", "quickstart", "moe.top_k=5"], "moe.top_k"),
        (["train", "quickstart", "parallel.expert_parallel_size=3"], "parallel.expert_parallel_size"),
        (["train", "quickstart", "parallel.expert_parallel_size=4"], "parallel.expert_parallel_size"),
        (["train", "quickstart", "--dry-run", "stages.0.steps=none"], "stages.0.steps"),
        (["train", "quickstart", "--dry-run", "precision"], "'precision'"),
        (["recipes", "quickstart", "seed=-1"], "seed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    arguments: list[str], key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert key in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trai"],
        ["train"],
        ["train", "quickstart", "--fesh"],
        ["train", "quickstart", "--resume", "--fresh"],
        ["eval", "run", "--limit", "0"],
        ["eval", "run", "seed=1"],
        ["eval", "run", "--dtype", "float16"],
        ["chat"],
        ["chat", "run", "--image", "a.png", "what is", "this ?"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_as_a_process() -> None:
    result = run_module("train", "quickstart", "moe.top_k=5", WORLD_SIZE="2", RANK="0")
    assert (result.returncode, result.stdout) == (2, "")
    assert "moe.top_k" in result.stderr
    assert "Traceback" not in result.stderr


def test_other_ranks_fail_in_silence() -> None:
    result = run_module("train", "quickstart", "moe.top_k=5", WORLD_SIZE="2", RANK="1")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_debug_shows_the_traceback() -> None:
    result = run_module("recipes", "quickstrt", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RecipeError" in result.stderr


def test_an_error_of_ours_keeps_its_traceback(calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Path) -> Path:
        raise RuntimeError("a bug")

    monkeypatch.setitem(sys.modules, "moe_lvlm.analysis.report", SimpleNamespace(write_report=broken))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["report", "r"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(run: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "moe_lvlm.analysis.report", SimpleNamespace(write_report=stopped))
    assert cli.main(["report", "r"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "quickstart", "seed=7", "stages.0.steps=20", "--fresh"],
        ["train", "quickstart", "--fresh", "seed=7", "stages.0.steps=20"],
        ["train", "--fresh", "quickstart", "seed=7", "stages.0.steps=20"],
        ["train", "quickstart", "seed=7", "--fresh", "stages.0.steps=20"],
    ],
)
def test_overrides_may_stand_anywhere(
    arguments: list[str], calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_lvlm.config.load import load_recipe

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(arguments) == 0
    assert calls == [
        (
            "train",
            load_recipe("quickstart", ["seed=7", "stages.0.steps=20"]),
            {"resume": False, "stop_signal": None, "until": None},
        )
    ]


def test_handlers_pass_everything_on(calls: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("runs/x")
    assert (
        cli.main(["eval", "runs/x", "--limit", "5", "--batch-size", "3", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    )
    assert cli.main(["report", "runs/x"]) == 0
    assert cli.main(["chat", "runs/x", "--image", "a.png", "what = this ?"]) == 0
    assert cli.main(["chat", "runs/x", "--image", "a.png"]) == 0
    assert cli.main(["chat", "runs/x"]) == 0
    assert calls == [
        ("evaluate", run, {"limit": 5, "batch_size": 3, "device": "cpu", "dtype": "bfloat16"}),
        ("write_report", run, {}),
        ("chat", run, Path("a.png"), "what = this ?", {}),
        ("chat", run, Path("a.png"), None, {}),
        ("chat", run, None, None, {}),
    ]
    assert "r/report/index.html" in capsys.readouterr().out


def test_dry_run_trains_nothing(calls: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "quickstart", "--dry-run"]) == 0
    assert [call[0] for call in calls] == ["describe"]
    assert capsys.readouterr().out == "described\n"


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    assert capsys.readouterr().out.startswith("quickstart ")
    assert cli.main(["recipes", "quickstart", "name=other", "--folder"]) == 0
    assert capsys.readouterr().out == "runs/other\n"
    assert cli.main(["recipes", "quickstart", "output_dir=/tmp/here", "--folder"]) == 0
    assert capsys.readouterr().out == "/tmp/here\n"
