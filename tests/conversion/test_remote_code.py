"""Our modelling code as files: complete, flat, and without our package. What it computes is held by test_export.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from moe_lvlm.conversion.remote_code import closure, remote_code


def imports(text: str) -> list[tuple[int, str]]:
    """(level, module) of all `from` imports, (0, module) of plain ones."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found.extend((0, alias.name) for alias in node.names)
    return found


def test_the_files_need_each_other_and_no_more() -> None:
    code = remote_code()
    for name, content in code.files.items():
        for level, module in imports(content.decode()):
            if level:
                assert level == 1 and f"{module}.py" in code.files, f"{name}: {module}"
            else:
                assert module.split(".")[0] not in ("moe_lvlm", "deepspeed", "accelerate"), f"{name}: {module}"
    assert code.packages == ("pydantic", "torch", "transformers")
    assert code.auto_map == {
        "AutoConfig": "models_config.MoELlavaConfig",
        "AutoModelForImageTextToText": "models_llava.MoELlavaForConditionalGeneration",
    }
    assert {"routing_ltdr.py", "moe_experts.py", "config_moe.py"} <= code.files.keys()
    assert not [name for name in code.files if name.startswith(("training", "checkpoint", "parallel", "data"))]


def test_only_imports_and_registrations_are_changed() -> None:
    """Line by line against the package's own files."""
    import moe_lvlm

    package = Path(moe_lvlm.__file__).parent
    changed = []
    for name, content in remote_code().files.items():
        room, _, module = name.removesuffix(".py").partition("_")
        own = (package / room / f"{module}.py").read_text().rstrip().splitlines()
        copied = content.decode().splitlines()[1:]
        kept = [line for line in own if line in copied]
        changed += [line for line in own if line not in kept]
        # nothing new but the imports of siblings
        assert all(line.lstrip().startswith("from .") for line in copied if line not in own)
    assert all(line.lstrip().startswith("from moe_lvlm.") or ".register(" in line for line in changed)
    assert sum(".register(" in line for line in changed) == 2


def package(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / "room" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return root


def test_a_closure_by_hand(tmp_path: Path) -> None:
    """Also imports inside functions; circles end."""
    root = package(
        tmp_path,
        a="from moe_lvlm.room.b import x\ndef f():\n    from moe_lvlm.room.c import y\n",
        b="x = 1\nfrom moe_lvlm.room.a import f\n",
        c="import torch\n",
        d="",
    )
    assert list(closure("moe_lvlm.room.a", root)) == ["moe_lvlm.room.a", "moe_lvlm.room.b", "moe_lvlm.room.c"]


@pytest.mark.parametrize(
    "line", ["import moe_lvlm.room.b", "from moe_lvlm import room", "from .b import x", "from moe_lvlm.room import b"]
)
def test_imports_that_cannot_be_flattened(tmp_path: Path, line: str) -> None:
    root = package(tmp_path, a=line + "\n", b="x = 1\n")
    with pytest.raises(ValueError, match=r"allowed: from moe_lvlm\.x\.y import name|import from the module itself"):
        closure("moe_lvlm.room.a", root)
