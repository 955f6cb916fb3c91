"""A value that settings refuse, in words that say what is allowed instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from moe_lvlm.config.errors import did_you_mean, shown


def describe_problem(item: Any, root: type[BaseModel]) -> str:
    """What is wrong with one value, and what is allowed.

    item: one of `ValidationError.errors()`. root: the settings that were validated.
    """
    loc = item["loc"]
    if item["type"] == "extra_forbidden":
        allowed = _allowed_keys(root, loc[:-1])
        return f"unknown key{did_you_mean(str(loc[-1]), allowed)}; allowed here: {', '.join(allowed)}"
    if item["type"] == "missing":
        return "this key is missing"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "union_tag_invalid":
        return f"kind: {item['ctx']['tag']!r}; allowed: {item['ctx']['expected_tags']}"
    if item["type"] == "union_tag_not_found":
        return f"kind: this key is missing; it says which of {', '.join(_kinds(root, loc))} the other keys are for"
    hint = " (write true or false)" if item["type"] == "bool_type" else ""
    return f"{shown(item['input'])}; {_in_yaml_words(item['msg'])}{hint}"


def _in_yaml_words(message: str) -> str:
    """A sentence of pydantic's in lower case and with the names that a recipe's reader knows."""
    words = {"Array": "list", "array": "list", "Tuple": "list", "tuple": "list", "an object": "a mapping"}
    text = re.sub("|".join(words), lambda match: words[match[0]], message.removesuffix(" after validation, not 0"))
    return text[0].lower() + text[1:]


def _settings(root: type[BaseModel], loc: Sequence[str | int]) -> list[type[BaseModel]]:
    """The groups of settings that may stand at a location."""
    found: list[type[BaseModel]] = [root]
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


def _kinds(root: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    return [kind for model in _settings(root, loc) if (kind := _kind(model)) is not None]


def _allowed_keys(root: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    return list(dict.fromkeys(name for model in _settings(root, loc) for name in model.model_fields))
