"""The files that recipes are made of: where they lie, what they are called, what they hold.

The package ships recipes; fragments, whose file's name begins with an underscore and which recipes extend; and scales,
which are laid over recipes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from moe_lvlm.config.errors import RecipeError, did_you_mean, one_line, shown
from moe_lvlm.config.yaml_text import parse_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SCALES = "scales"  # the folder of overlays, which are no recipes
_SUFFIXES = (".yaml", ".yml")


def list_recipes() -> list[str]:
    """Names of the recipes that the package ships, such as `quickstart` or `ltdr/dar`."""
    return [name for name in _names() if not name.rpartition("/")[2].startswith("_")]


def list_scales() -> dict[str, Path]:
    """The scales that the package ships, each with its file."""
    return {path.stem: path for path in sorted((RECIPES / SCALES).glob("*.yaml"))}


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe: a name from `list_recipes`, or the path of a file that ends in .yaml or .yml.

    Raises:
        RecipeError: there is no such recipe or file.
    """
    text = str(name_or_path)
    if Path(text).suffix in _SUFFIXES:
        if not Path(text).is_file():
            raise RecipeError(f"{text}: no such file; allowed: a YAML file, or one of {', '.join(list_recipes())}")
        return Path(text)
    if text not in list_recipes():
        raise RecipeError(
            f"unknown recipe {text!r}{did_you_mean(text, list_recipes())}; "
            f"allowed: {', '.join(list_recipes())}, or the path of a file that ends in .yaml"
        )
    return RECIPES / f"{text}.yaml"


def base_path(base: Any, file: Path, where: str) -> Path:
    """The file that `extends: base` in `file` means: a recipe or a fragment by name, or a path relative to `file`.

    where: how an error begins.

    Raises:
        RecipeError: there is no such recipe, fragment or file.
    """
    if isinstance(base, str) and Path(base).suffix in _SUFFIXES:
        if not (file.parent / base).is_file():
            raise RecipeError(f"{where}: {shown(base)}: no such file in {file.parent}")
        return file.parent / base
    if base not in _names():
        raise RecipeError(
            f"{where}: {shown(base)}: no such recipe{did_you_mean(str(base), _names())}; allowed: "
            f"{', '.join(_names())}, or the path of a file that ends in .yaml, relative to {file.parent}"
        )
    return RECIPES / f"{base}.yaml"


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, plain and without shared parts.

    Raises:
        RecipeError: the file is no YAML, no mapping, or holds what JSON has no word for.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this is {shown(data)}")
    plain = as_plain(data, str(path))
    assert isinstance(plain, dict)
    return plain


def as_plain(value: Any, where: str) -> Any:
    """A value of YAML as JSON gives it back: an anchor's value is copied to every place that names it, so that none
    changes with another.

    Raises:
        RecipeError: it holds a set, bytes, itself, ...
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: only text, numbers, true, false, null, lists and mappings: {error}") from error


def _names() -> list[str]:
    names = (path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
    # those of no paper first
    return sorted((name for name in names if not name.startswith(f"{SCALES}/")), key=lambda name: ("/" in name, name))
