"""Our model's own code as files beside its weights, for programs that have transformers but not this package.

The files are this package's modules themselves: those that the model's class needs, found by their imports, flattened
into one folder (`routing/types.py` becomes `routing_types.py`) with imports of each other as siblings. transformers runs
them with `trust_remote_code=True`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import moe_lvlm

PACKAGE = "moe_lvlm"
CONFIG_CLASS = "moe_lvlm.models.config.MoELlavaConfig"
MODEL_CLASS = "moe_lvlm.models.llava.MoELlavaForConditionalGeneration"
# What transformers' auto classes are asked for, and which class of ours answers. Not AutoModel: the model without its
# head builds no mixture of experts.
_AUTO_CLASSES = {"AutoConfig": CONFIG_CLASS, "AutoModelForImageTextToText": MODEL_CLASS}


@dataclass(frozen=True, slots=True)
class RemoteCode:
    """files: content by name. auto_map: for config.json. packages: what the files import, besides Python's own."""

    files: Mapping[str, bytes]
    auto_map: Mapping[str, str]
    packages: tuple[str, ...]


def remote_code(root: Path | None = None) -> RemoteCode:
    """The files that load and run our model.

    root: the folder of the package; None is this one.

    Raises:
        ValueError: a module imports in a form that cannot be flattened.
    """
    folder = root or Path(moe_lvlm.__file__).resolve().parent
    modules = closure(_module_of(MODEL_CLASS), folder)
    files = {f"{_flat(name)}.py": _rewrite(name, text).encode() for name, text in modules.items()}
    auto_map = {auto: f"{_flat(_module_of(ours))}.{ours.rpartition('.')[2]}" for auto, ours in _AUTO_CLASSES.items()}
    found = {top for text in modules.values() for top in _packages(ast.parse(text))}
    return RemoteCode(files, auto_map, tuple(sorted(found - {PACKAGE})))


def closure(start: str, root: Path) -> dict[str, str]:
    """A module and all modules of the package that it needs, by name: their texts, in the order of their names."""
    texts: dict[str, str] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        path = root.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if not path.is_file():
            raise ValueError(f"{name}: not a module with a file of its own ({path}); import from the module itself")
        texts[name] = path.read_text(encoding="utf-8")
        waiting.extend(module for _, module in _imports_of_ours(name, ast.parse(texts[name])))
    return dict(sorted(texts.items()))


def _module_of(qualified: str) -> str:
    return qualified.rpartition(".")[0]


def _flat(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def _imports_of_ours(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import from the package.

    Raises:
        ValueError: an import of another form than `from moe_lvlm.room.module import name`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.partition(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == PACKAGE):
            if not node.level and "." in (node.module or ""):
                yield node.lineno, node.module or ""
                continue
            ours = [node.module or "."]
        else:
            continue
        if ours:
            raise ValueError(
                f"{name}, line {node.lineno}: import of {ours[0]}; allowed: from {PACKAGE}.x.y import name"
            )


def _packages(tree: ast.Module) -> Iterator[str]:
    """What a module needs from elsewhere; not what it tries to import, which only some machines need."""
    tried = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in tried:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if (top := name.partition(".")[0]) not in sys.stdlib_module_names:
                yield top


def _rewrite(name: str, text: str) -> str:
    """The module's text with its imports of ours from siblings, and without its entries in transformers' tables.

    Registering would put the copy in the place of the package's own class in a process that has both.
    """
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    for number, module in _imports_of_ours(name, tree):
        lines[number - 1] = lines[number - 1].replace(f"from {module} import", f"from .{_flat(module)} import", 1)
    for statement in tree.body:
        if _is_registration(statement):
            for number in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                lines[number - 1] = ""
    path = f"{name.replace('.', '/')}.py"
    head = (
        f"# From moe-lvlm {moe_lvlm.__version__} (Apache-2.0): {path}, written by its export. Changes belong there.\n"
    )
    return head + "".join(lines).rstrip() + "\n"


def _is_registration(statement: ast.stmt) -> bool:
    """Whether it is `AutoSomething.register(...)`."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    target = call.func if isinstance(call, ast.Call) else None
    if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
        return False
    return target.attr == "register" and target.value.id.startswith("Auto")
