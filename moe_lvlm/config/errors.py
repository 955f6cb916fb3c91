"""Errors of recipes, and the words they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import yaml


class RecipeError(ValueError):
    """A mistake in a recipe, an override or a DeepSpeed file. Says where it stands, what it is, and what is allowed."""


def did_you_mean(word: str, allowed: Sequence[str]) -> str:
    """`, did you mean 'x'?` for the nearest allowed word, or nothing."""
    near = get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """A value in an error, cut to a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: Exception) -> str:
    """An error of PyYAML without its excerpt: the problem and the line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
