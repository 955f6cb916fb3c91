"""Recipes from YAML: by name or path, with `key=value` overrides, and with errors that say what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from moe_lvlm.config.recipe import Recipe
from moe_lvlm.config.yaml_text import dump_yaml, parse_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_FRAGMENTS = "scales"  # overlays, no recipes of their own


class RecipeError(ValueError):
    """A mistake in a recipe, an override or a DeepSpeed file. Says where it stands, what it is, and what is allowed."""


def list_recipes() -> list[str]:
    """Names of the recipes that the package ships, such as `quickstart`."""
    names = (path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith(f"{_FRAGMENTS}/"))


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe: a name from `list_recipes`, or the path of a file that ends in .yaml or .yml.

    Raises:
        RecipeError: there is no such recipe or file.
    """
    text = str(name_or_path)
    if Path(text).suffix in (".yaml", ".yml"):
        if not Path(text).is_file():
            raise RecipeError(f"{text}: no such file; allowed: a YAML file, or one of {', '.join(list_recipes())}")
        return Path(text)
    if text not in list_recipes():
        raise RecipeError(
            f"unknown recipe {text!r}{did_you_mean(text, list_recipes())}; "
            f"allowed: {', '.join(list_recipes())}, or the path of a file that ends in .yaml"
        )
    return RECIPES / f"{text}.yaml"


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: a name from `list_recipes`, or the path of a YAML file.
        overrides: `key=value`, the key with dots (`train.precision=fp32`, `stages.0.steps=20`), the value as YAML.

    Raises:
        RecipeError: every problem of the recipe in a line of its own: where, the key's path, the value, what is allowed.
    """
    path = recipe_path(name_or_path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this is {_shown(data)}")
    sources = {_apply(data, override): f"override {override!r}" for override in overrides}
    try:
        # JSON mode, strictly: lists become tuples, but "20" is no number and 1 is no boolean.
        return Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_describe(error, data, str(path), sources))) from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: only text, numbers, true, false, null, lists and mappings: {error}") from error


def dump_recipe(recipe: Recipe) -> str:
    """A recipe, resolved, as YAML that `load_recipe` reads back equal."""
    return dump_yaml(recipe.model_dump(mode="json"))


def did_you_mean(word: str, allowed: Sequence[str]) -> str:
    """`, did you mean 'x'?` for the nearest allowed word, or nothing."""
    near = get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def _apply(data: dict[str, Any], override: str) -> tuple[str | int, ...]:
    """Write an override into the data. Returns the key's path."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: write key=value, such as train.precision=fp32 or stages.0.steps=20")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {_one_line(error)}") from error
    node: Any = data
    path: list[str | int] = []
    for position, part in enumerate(parts):
        step = _step(node, part, path, override)
        path.append(step)
        if position == len(parts) - 1:
            node[step] = value
        elif isinstance(node, dict) and node.get(str(step)) is None:
            node[step] = {}
        node = node[step]
    return tuple(path)


def _step(node: Any, part: str, path: Sequence[str | int], override: str) -> str | int:
    """The key or index that a part of an override's key means at this place."""
    here = ".".join(map(str, path))
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise RecipeError(f"override {override!r}: {here} is {_shown(node)}, it has no key {part!r}")
    if not part.isdecimal() or int(part) >= len(node):
        raise RecipeError(f"override {override!r}: {here} is a list; allowed after it: an index, 0 to {len(node) - 1}")
    return int(part)


def _describe(
    error: ValidationError, data: dict[str, Any], file: str, sources: Mapping[tuple[str | int, ...], str]
) -> list[str]:
    """One readable line for each key with a problem."""
    problems: dict[tuple[str | int, ...], list[str]] = {}
    items = error.errors(include_url=False)
    for item in items:
        if item["type"] == "too_short" and any(other["loc"][:-1][: len(item["loc"])] == item["loc"] for other in items):
            continue  # pydantic counts only the members that passed; their own lines say what is wrong
        path = _key_path(item["loc"], data, is_missing=item["type"] == "missing")
        text = _problem(item)
        if match := re.match(r"([a-z_]+(?:\.[a-z_]+)*): ", text):  # our own validators begin with the key they mean
            path, text = (*path, *match[1].split(".")), text[match.end() :]
        problems.setdefault(path, []).append(text)
    lines = []
    for path, texts in problems.items():
        source = next((text for key, text in sources.items() if _is_about(path, key)), file)
        lines.append(": ".join(filter(None, (source, ".".join(map(str, path)), "; or: ".join(dict.fromkeys(texts))))))
    return lines


def _is_about(path: tuple[str | int, ...], key: tuple[str | int, ...]) -> bool:
    """Whether a problem at `path` comes from an override of `key`: at it, below it, or at an unknown key above it."""
    length = min(len(path), len(key))
    return (
        length > 0 and path[:length] == key[:length] and (len(path) >= len(key) or path[0] not in Recipe.model_fields)
    )


def _key_path(loc: tuple[str | int, ...], data: Any, *, is_missing: bool) -> tuple[str | int, ...]:
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


def _problem(item: Any) -> str:
    """What is wrong with one value, and what is allowed."""
    loc = item["loc"]
    if item["type"] == "extra_forbidden":
        allowed = _allowed_keys(loc[:-1])
        return f"unknown key{did_you_mean(str(loc[-1]), allowed)}; allowed here: {', '.join(allowed)}"
    if item["type"] == "missing":
        return "this key is missing"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "union_tag_invalid":
        return f"kind: {item['ctx']['tag']!r}; allowed: {item['ctx']['expected_tags']}"
    if item["type"] == "union_tag_not_found":
        return f"kind: this key is missing; it says which of {', '.join(_kinds(loc))} the other keys are for"
    hint = " (write true or false)" if item["type"] == "bool_type" else ""
    return f"{_shown(item['input'])}; {_in_yaml_words(item['msg'])}{hint}"


def _in_yaml_words(message: str) -> str:
    """A sentence of pydantic's in lower case and with the names that a recipe's reader knows."""
    words = {"Array": "list", "array": "list", "Tuple": "list", "tuple": "list", "an object": "a mapping"}
    text = re.sub("|".join(words), lambda match: words[match[0]], message.removesuffix(" after validation, not 0"))
    return text[0].lower() + text[1:]


def _settings(loc: Sequence[str | int]) -> list[type[BaseModel]]:
    """The groups of settings that may stand at a location."""
    found: list[type[BaseModel]] = [Recipe]
    for part in loc:
        fields = [model.model_fields[part] for model in found if isinstance(part, str) and part in model.model_fields]
        if fields:
            found = [model for field in fields for model in _models(field.annotation)]
        elif tagged := [model for model in found if _kind(model) == part]:
            found = tagged
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes inside an annotation such as `tuple[StageSettings, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else str(field.default)


def _kinds(loc: Sequence[str | int]) -> list[str]:
    return [kind for model in _settings(loc) if (kind := _kind(model)) is not None]


def _allowed_keys(loc: Sequence[str | int]) -> list[str]:
    return list(dict.fromkeys(name for model in _settings(loc) for name in model.model_fields))


def _shown(value: Any) -> str:
    """A value in an error, cut to a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(error: Exception) -> str:
    """An error of PyYAML without its excerpt: the problem and the line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
