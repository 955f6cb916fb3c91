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
    """Of values that belong together seed by seed. agree: seeds whose difference has the sign of the mean. ties: seeds
    without a difference."""

    mean: float
    sd: float | None
    n: int
    agree: int
    ties: int = 0

    @property
    def sign_p(self) -> float | None:
        """Two-sided p of the exact sign test: so many seeds or more with the same sign, were either as likely. Ties are
        left out; None if there are only ties."""
        n = self.n - self.ties
        if n == 0:
            return None
        most = max(self.agree, n - self.agree)
        return min(1.0, 2 * sum(math.comb(n, count) for count in range(most, n + 1)) / 2**n)

    @property
    def t_p(self) -> float | None:
        """Two-sided p of the paired t test; None of a single seed, or where all differences are the same."""
        if not self.sd:
            return None
        return student_p(self.mean / (self.sd / math.sqrt(self.n)), self.n - 1)


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
    return Difference(whole.mean, whole.sd, whole.n, agree, ties=found.count(0))


def student_p(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 4)."""
    theta = math.atan(abs(t) / math.sqrt(df))
    cosine = math.cos(theta)
    # cos^m times (2 4 ... m - 1) / (3 5 ... m) for odd m, (1 3 ... m - 1) / (2 4 ... m) for even m
    term = cosine if df % 2 else 1.0
    total = 0.0
    for power in range(1 if df % 2 else 0, df - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    inside = math.sin(theta) * total
    return 1 - (2 / math.pi * (theta + inside) if df % 2 else inside)


def mean_of(values: Values) -> float | None:
    """The mean, if no value is missing."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
