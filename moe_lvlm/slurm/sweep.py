"""One recipe with several values of some of its keys: the runs of an array of jobs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from moe_lvlm.slurm.site import JobError

_LONGEST = 200  # of a folder's name; file systems end at 255


@dataclass(frozen=True, slots=True)
class Variant:
    """One run of a sweep. name: of its folder. overrides: `key=value`, for `load_recipe`."""

    name: str
    overrides: tuple[str, ...]


def variants(sweep: Sequence[str]) -> list[Variant]:
    """All combinations of `key=a,b,c`, the last key fastest. A value with commas of its own stands in [] or {}.

    Raises:
        JobError: a key without values, twice the same key or value, or names that do not differ.
    """
    keys: dict[str, list[str]] = {}
    for one in sweep:
        key, equals, text = one.partition("=")
        values = [value.strip() for value in _split(text)]
        if not equals or not key.strip() or not all(values):
            raise JobError(f"--sweep {one!r}; allowed: key=value,value,... such as seed=0,1,2")
        if key.strip() in keys:
            raise JobError(f"--sweep {one!r}: the key {key.strip()} is swept twice; allowed: once, with all its values")
        if len(set(values)) < len(values):
            raise JobError(f"--sweep {one!r}: a value stands twice; allowed: each value once")
        keys[key.strip()] = values
    found = []
    for chosen in product(*keys.values()):
        overrides = tuple(f"{key}={value}" for key, value in zip(keys, chosen, strict=True))
        found.append(Variant(_folder_name(overrides), overrides))
    names = [variant.name for variant in found]
    if len(set(names)) < len(names):
        raise JobError(
            f"--sweep: two runs would have the folder {max(names, key=names.count)!r}; allowed: values that differ"
        )
    return found


def _split(text: str) -> list[str]:
    """Split at commas that stand in no bracket."""
    parts, depth = [""], 0
    for mark in text:
        depth += (mark in "[{(") - (mark in "]})")
        if mark == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += mark
    return parts


def _folder_name(overrides: Sequence[str]) -> str:
    """`seed=0,train.precision=bf16`; what no path should hold becomes an underscore."""
    name = ",".join(re.sub(r"[^A-Za-z0-9._=+-]+", "_", override) for override in overrides)
    if len(name) > _LONGEST:
        raise JobError(
            f"--sweep: the run's folder would be named {name[:60]}... ({len(name)} characters); allowed: {_LONGEST}"
        )
    return name
