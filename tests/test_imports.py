"""The house holds: imports between rooms point one way, `import moe_lvlm` is light, its public names are there."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_lvlm

PACKAGE = Path(moe_lvlm.__file__).resolve().parent

# Which rooms a room may import from, besides itself (DESIGN: config -> routing -> moe -> {adapters, connectors} ->
# models -> parallel -> training; the wings stand beside it).
MAIN_LINE = ["config", "routing", "moe", "adapters", "connectors", "models"]
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "routing": {"config"},
    "moe": {"config", "routing"},
    "adapters": {"config", "routing", "moe"},
    "connectors": {"config", "routing", "moe"},
    "models": {"config", "routing", "moe", "adapters", "connectors"},
    "parallel": {*MAIN_LINE},
    "data": {"config", "routing"},
    "checkpoint": {"config"},
    "conversion": {*MAIN_LINE, "data", "checkpoint"},
    "analysis": {*MAIN_LINE, "data"},
    "evaluation": {*MAIN_LINE, "data", "checkpoint", "analysis"},
    "training": {*MAIN_LINE, "parallel", "data", "checkpoint", "analysis", "evaluation"},
    "estimation": {*MAIN_LINE, "data", "training", "analysis"},
    "recipes": set(),
    "slurm": {"config", "monitoring"},
    "preflight": set(),
    "monitoring": {"config"},
}
# Not asked: the modules at the top (cli, __init__, __main__), which serve every room.
DEEPSPEED_ROOMS = {"parallel", "training", "checkpoint"}
# What models and checkpoints need of the wings to find and read weights. The circle test below counts it.
EXCEPTIONS = {
    ("checkpoint", "moe_lvlm.data.packs"),
    ("models", "moe_lvlm.data.packs"),
    ("models", "moe_lvlm.checkpoint.source"),
    ("models", "moe_lvlm.checkpoint.verify"),
}


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, inside functions too; not what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    skipped = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    assert room in ALLOWED, f"{room}: a new room needs its row in this test"
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "deepspeed":
            assert room in DEEPSPEED_ROOMS, f"{path}: imports {name}"
        if parts[0] != "moe_lvlm" or len(parts) == 1:
            continue
        other = parts[1]
        is_exception = any(room == one and f"{name}.".startswith(f"{module}.") for one, module in EXCEPTIONS)
        if other != room and (PACKAGE / other).is_dir() and not is_exception:
            assert other in ALLOWED[room], f"{path}: {room} may not import {name}"


def test_the_direction_has_no_circle() -> None:
    allowed = {
        room: needed | {module.split(".")[1] for one, module in EXCEPTIONS if one == room}
        for room, needed in ALLOWED.items()
    }
    done: set[str] = set()
    while ready := {room for room, needed in allowed.items() if room not in done and needed <= done}:
        done |= ready
    assert done == set(ALLOWED)


@pytest.mark.parametrize("name", sorted(set(moe_lvlm.__all__) - {"__version__"}))
def test_public_names(name: str) -> None:
    assert callable(getattr(moe_lvlm, name))
    assert name in dir(moe_lvlm)


def test_evaluation_and_loading_do_not_import_deepspeed() -> None:
    code = "import sys, moe_lvlm.evaluation.runner, moe_lvlm.models.load; print('deepspeed' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'upcycel'"):
        moe_lvlm.upcycel  # noqa: B018
