"""What the commands of `moe-lvlm` share: how a subcommand and its common arguments are declared. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command(commands: Commands, name: str, help_text: str, *examples: str) -> argparse.ArgumentParser:
    """Declare a subcommand. examples: lines of its help."""
    parser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog="\n  ".join(["example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_recipe_arguments(parser: argparse.ArgumentParser, *, recipe_is_optional: bool = False) -> None:
    """`recipe` and `overrides`, for `load_recipe`."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?" if recipe_is_optional else None,
        help="a name from `moe-lvlm recipes`, or the path of a YAML file",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="settings in place of the recipe's, such as stages.0.steps=20, or scale=tiny",
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """`run`, the path of a run's folder."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, such as runs/quickstart")


def positive(text: str) -> int:
    """The type of an argument that is a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number above 0")
    return int(text)


def count(text: str) -> int:
    """The type of an argument that is a whole number, 0 or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number, 0 or above")
    return int(text)
