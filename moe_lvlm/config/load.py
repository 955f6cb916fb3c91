"""Recipes from YAML: by name or path, with `key=value` overrides, and with errors that say what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moe_lvlm.config.errors import RecipeError, did_you_mean, one_line, shown
from moe_lvlm.config.files import as_plain, list_recipes, recipe_path
from moe_lvlm.config.layers import KeyPath, Layers, read_layers
from moe_lvlm.config.problems import describe_problem
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.config.yaml_text import dump_yaml, parse_yaml

__all__ = ["RecipeError", "did_you_mean", "dump_recipe", "list_recipes", "load_recipe", "recipe_path"]


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with all that it extends, lay its scale over it (`config/layers.py`), and apply overrides.

    Args:
        name_or_path: a name from `list_recipes`, or the path of a YAML file.
        overrides: `key=value`, the key with dots (`train.precision=fp32`, `stages.0.steps=20`), the value as YAML.
            `scale=tiny` takes the place of the recipe's own scale; the other overrides are laid over it.

    Raises:
        RecipeError: every problem of the recipe in a line of its own: where, the key's path, the value, what is allowed.
    """
    path = recipe_path(name_or_path)
    settings = [_parse(override) for override in overrides]
    scales = [(setting.value, setting.where) for setting in settings if setting.keys == ("scale",)]
    layers = read_layers(path, scales[-1] if scales else None)
    for setting in settings:
        if setting.keys != ("scale",):
            _apply(setting, layers)
    try:
        # JSON mode, strictly: lists become tuples, but "20" is no number and 1 is no boolean.
        return Recipe.model_validate_json(json.dumps(layers.data), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_describe(error, layers, str(path)))) from error


def dump_recipe(recipe: Recipe) -> str:
    """A recipe, resolved, as YAML that `load_recipe` reads back equal."""
    return dump_yaml(recipe.model_dump(mode="json"))


@dataclass(frozen=True, slots=True)
class _Override:
    """`key=value`. keys: the parts of the key. where: how an error about it begins."""

    keys: tuple[str, ...]
    value: Any
    where: str


def _parse(override: str) -> _Override:
    where = f"override {override!r}"
    key, equals, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(f"{where}: write key=value, such as train.precision=fp32 or stages.0.steps=20")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: the value is not YAML: {one_line(error)}") from error
    return _Override(keys, as_plain(value, where), where)


def _apply(override: _Override, layers: Layers) -> None:
    """Write an override over the files."""
    node: Any = layers.data
    path: KeyPath = ()
    for key in override.keys[:-1]:
        step = _step(node, key, path, override.where)
        path = (*path, step)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
            layers.note(path, override.where)
        node = node[step]
    step = _step(node, override.keys[-1], path, override.where)
    node[step] = override.value
    layers.note((*path, step), override.where)


def _step(node: Any, part: str, path: KeyPath, where: str) -> str | int:
    """The key or index that a part of an override's key means at this place."""
    here = ".".join(map(str, path))
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise RecipeError(f"{where}: {here} is {shown(node)}, it has no key {part!r}")
    if not part.isdecimal() or int(part) >= len(node):
        raise RecipeError(f"{where}: {here} is a list; allowed after it: an index, 0 to {len(node) - 1}")
    return int(part)


def _describe(error: ValidationError, layers: Layers, file: str) -> list[str]:
    """One readable line for each key with a problem, which begins with the file or override that it is from."""
    problems: dict[KeyPath, list[str]] = {}
    items = error.errors(include_url=False)
    for item in items:
        if item["type"] == "too_short" and any(other["loc"][:-1][: len(item["loc"])] == item["loc"] for other in items):
            continue  # pydantic counts only the members that passed; their own lines say what is wrong
        path = _key_path(item["loc"], layers.data, is_missing=item["type"] == "missing")
        text = describe_problem(item, Recipe)
        if match := re.match(r"([a-z_]+(?:\.[a-z_]+)*): ", text):  # our own validators begin with the key they mean
            path, text = (*path, *match[1].split(".")), text[match.end() :]
        problems.setdefault(path, []).append(text)
    lines = []
    for path, texts in problems.items():
        source = layers.source(path) or file
        lines.append(": ".join(filter(None, (source, ".".join(map(str, path)), "; or: ".join(dict.fromkeys(texts))))))
    return lines


def _key_path(loc: KeyPath, data: Any, *, is_missing: bool) -> KeyPath:
    """A location of pydantic's without the names of union members, which are no keys of the file."""
    path: list[str | int] = []
    node = data
    for position, part in enumerate(loc):
        is_key = isinstance(node, dict) and part in node
        is_index = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_key or is_index:
            path.append(part)
            node = node[part]
        elif is_missing and position == len(loc) - 1:
            path.append(part)
    return tuple(path)
