"""Is a distribution of routing probability variances long-tailed? Measures of a histogram's shape.

H bins. Of known shapes: uniform from 0 has skewness 0, a Gini coefficient of 1/3 and half its values below the mean;
exponential 2, 1/2 and 63 %; a longer tail more of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lvlm.analysis.statistics import SiteStatistics


@dataclass(frozen=True, slots=True)
class Shape:
    """below_mean: share of values below the mean. gini: Gini coefficient. top_tenth: share of the sum of all values that
    the largest tenth of them holds. shares: of values in ten equal steps up to the highest variance there can be."""

    skewness: float
    below_mean: float
    gini: float
    top_tenth: float


def shape_of(values: SiteStatistics, row: int) -> Shape | None:
    """The shape of a layer's variances. row: the modality's.

    None without a token, and where one bin holds more than half of all tokens: the histogram is then too coarse for it.
    """
    counts = values.histogram[row]
    total = int(counts.sum())
    if not total or counts.max() > total / 2:
        return None
    edges = values.edges
    return histogram_shape(counts, (edges[1:] + edges[:-1]) / 2)


def histogram_shape(counts_H: NDArray[np.int64], centres_H: NDArray[np.float64]) -> Shape:
    """Of counts at the centres of equal bins, ascending and not below 0; values count as their bin's centre."""
    share_H = counts_H / counts_H.sum()
    mean = float(share_H @ centres_H)
    deviation_H = centres_H - mean
    variance = float(share_H @ deviation_H**2)
    # the Lorenz curve: share of values, from the lowest, and the share of the sum that they hold
    people, wealth = np.cumsum(share_H), np.cumsum(share_H * centres_H) / mean
    people, wealth = np.concatenate([[0.0], people]), np.concatenate([[0.0], wealth])
    area = float(np.sum(np.diff(people) * (wealth[1:] + wealth[:-1]) / 2))
    return Shape(
        skewness=float(share_H @ deviation_H**3) / variance**1.5 if variance else 0.0,
        below_mean=float(share_H[centres_H < mean].sum()),
        gini=1 - 2 * area,
        top_tenth=1 - float(np.interp(0.9, people, wealth)),
    )
