"""Means and spreads over seeds. A seed's value is None where there is none, and then takes part in nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Spread:
    """mean and sample standard deviation (n - 1 in the denominator; None of a single value) of n values."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Of values that belong together seed by seed. agree: seeds whose difference has the sign of the mean."""

    mean: float
    sd: float | None
    n: int
    agree: int


def spread(values: Values) -> Spread | None:
    """None without a value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def difference(values: Values, baseline: Values) -> Difference | None:
    """Values - baseline, paired by seed. None where no seed has both.

    Raises:
        ValueError: sequences of different lengths.
    """
    pairs = zip(values, baseline, strict=True)
    found = [one - other for one, other in pairs if one is not None and other is not None]
    whole = spread(found)
    if whole is None:
        return None
    agree = sum(math.copysign(1, value) == math.copysign(1, whole.mean) and value != 0 for value in found)
    return Difference(whole.mean, whole.sd, whole.n, agree)


def mean_of(values: Values) -> float | None:
    """The mean, if no value is missing."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
