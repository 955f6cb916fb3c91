"""A site's defaults: a small YAML file with the keys of `JobSettings`, under what the command line says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moe_lvlm.config.errors import one_line, shown
from moe_lvlm.config.problems import describe_problem
from moe_lvlm.config.yaml_text import parse_yaml
from moe_lvlm.slurm.settings import JobSettings

SITE_VARIABLE = "MOE_LVLM_SITE"


class JobError(ValueError):
    """A mistake in what a job asks for. Says where it stands, what it is, and what is allowed."""


def default_site() -> Path | None:
    """The site's file where none is named: $MOE_LVLM_SITE, else ~/.config/moe_lvlm/slurm.yaml if it is there.

    Raises:
        JobError: the variable names a file that is not there.
    """
    named = os.environ.get(SITE_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise JobError(f"{SITE_VARIABLE}: {named}: no such file")
        return Path(named)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = config / "moe_lvlm" / "slurm.yaml"
    return path if path.is_file() else None


def read_site(path: Path | None) -> dict[str, Any]:
    """The keys of a site's file; of none, none.

    Raises:
        JobError: no YAML mapping.
    """
    if path is None:
        return {}
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not YAML: {one_line(error)}") from error
    except FileNotFoundError as error:
        raise JobError(f"{path}: no such file; a site's defaults are a YAML file (docs/slurm.md)") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise JobError(f"{path}: {shown(data)}; allowed: a mapping of a job's settings")
    return data


def job_settings(site: Path | None, asked: Mapping[str, Any]) -> JobSettings:
    """A site's defaults with what was asked for laid over them; `preflight` and `container` key by key.

    Raises:
        JobError: every mistake in a line of its own: where it stands, the key, the value, what is allowed.
    """
    base = read_site(site)
    _validate(base, str(site))  # a mistake of the site's is said as one, whatever is asked for
    merged = dict(base)
    for key, value in asked.items():
        below = merged.get(key)
        merged[key] = {**below, **value} if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return _validate(merged, "this job")


def _validate(values: Mapping[str, Any], source: str) -> JobSettings:
    try:
        return JobSettings.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            place = ".".join(map(str, item["loc"]))
            lines.append(": ".join(filter(None, (source, place, describe_problem(item, JobSettings)))))
        raise JobError("\n".join(lines)) from error
