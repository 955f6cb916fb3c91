"""Routing statistics over many batches: a state of fixed size a layer, whatever the number of tokens.

M modalities (language, vision)   E experts   H histogram bins   T tokens
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_lvlm.analysis.foreground import area_under_curve
from moe_lvlm.analysis.measures import (
    MODALITIES,
    dropped_load,
    expert_load,
    routing_entropy,
    tail_flags,
)
from moe_lvlm.routing.ltdr import routing_probability_variance
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import LANGUAGE_MODEL, Modality, RoutingContext, RoutingDecision, Site

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Foreground = Sequence[NDArray[np.floating] | None]

NUM_BINS = 2000
_FORMAT = 2
_ARRAYS = ("load", "dropped", "tokens", "histogram", "rpv_sum", "tail_rpv_sum", "entropy_sum", "agreement", "auc")
# Files of format 1 lack them. What they hold was dropless, but their tails' RPV is unknown, not 0.
_SINCE_2 = ("dropped", "tail_rpv_sum")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How tail tokens meet the foreground at one layer, each value beside what chance gives.

    precision: share of tail tokens on the foreground; chance: the share of all tokens (`foreground_share`).
    recall: share of foreground tokens in the tail; chance: the share of all tokens (`tail_share`).
    auc: area under the ROC curve of RPV for the foreground, by image, mean over images; chance: 0.5.
    A value is None where its denominator is 0.
    """

    precision: float | None
    recall: float | None
    auc: float | None
    foreground_share: float
    tail_share: float
    num_tokens: int
    num_images: int


@dataclass(frozen=True, slots=True, eq=False)
class SiteStatistics:
    """Sums of one layer; the arrays are added to in place.

    load: int64 [M, E], assignments kept. dropped: the same of those that found no room (capacity). tokens: int64 [M + 1], routed tokens by modality, then tail tokens.
    histogram: int64 [M, H], RPV of tokens. rpv_sum, entropy_sum: float64 [M].
    tail_rpv_sum: float64 [1], over tail tokens; nan if it was read from a file of format 1, which does not hold it.
    agreement: int64 [4], tokens with known foreground: all, tail, foreground, both.
    auc: float64 [3], sum over images, images counted in it, images with known foreground.
    """

    load: IntArray
    dropped: IntArray
    tokens: IntArray
    histogram: IntArray
    rpv_sum: FloatArray
    tail_rpv_sum: FloatArray
    entropy_sum: FloatArray
    agreement: IntArray
    auc: FloatArray

    @staticmethod
    def empty(num_experts: int) -> SiteStatistics:
        """Zeros."""
        modalities = len(MODALITIES)
        return SiteStatistics(
            load=np.zeros((modalities, num_experts), dtype=np.int64),
            dropped=np.zeros((modalities, num_experts), dtype=np.int64),
            tokens=np.zeros(modalities + 1, dtype=np.int64),
            histogram=np.zeros((modalities, NUM_BINS), dtype=np.int64),
            rpv_sum=np.zeros(modalities),
            tail_rpv_sum=np.zeros(1),
            entropy_sum=np.zeros(modalities),
            agreement=np.zeros(4, dtype=np.int64),
            auc=np.zeros(3),
        )

    @property
    def num_experts(self) -> int:
        return self.load.shape[1]

    @property
    def edges(self) -> FloatArray:
        """Edges of the histogram's bins, [H + 1]: from 0 to the highest variance that E probabilities can have."""
        return np.linspace(0.0, highest_variance(self.num_experts), NUM_BINS + 1)

    @property
    def tail_share(self) -> float | None:
        """Share of vision tokens that are in the tail, or None without a vision token."""
        vision, tail = int(self.tokens[1]), int(self.tokens[2])
        return tail / vision if vision else None

    def mean_rpv(self, modality: Modality) -> float | None:
        """Mean routing probability variance of a modality's tokens, or None without one."""
        return self._mean(self.rpv_sum, modality)

    def dropped_share(self, modality: Modality) -> float | None:
        """Share of a modality's assignments that found no room, or None without one."""
        row = MODALITIES.index(modality)
        dropped = int(self.dropped[row].sum())
        chosen = dropped + int(self.load[row].sum())
        return dropped / chosen if chosen else None

    @property
    def mean_tail_rpv(self) -> float | None:
        """Mean RPV of vision tail tokens (LTDR figure 5), or None without one, or if the file does not hold it."""
        return _known_ratio(float(self.tail_rpv_sum[0]), int(self.tokens[2]))

    @property
    def mean_head_rpv(self) -> float | None:
        """Mean RPV of the other vision tokens, or None as for `mean_tail_rpv`."""
        return _known_ratio(float(self.rpv_sum[1] - self.tail_rpv_sum[0]), int(self.tokens[1] - self.tokens[2]))

    def mean_entropy(self, modality: Modality) -> float | None:
        """Mean routing entropy of a modality's tokens in nats, or None without one."""
        return self._mean(self.entropy_sum, modality)

    def _mean(self, sums: FloatArray, modality: Modality) -> float | None:
        row = MODALITIES.index(modality)
        count = int(self.tokens[row])
        return float(sums[row]) / count if count else None

    def foreground_agreement(self) -> Agreement | None:
        """Tail tokens against the foreground, or None if no foreground was given."""
        tokens, tail, foreground, both = (int(value) for value in self.agreement)
        if not tokens:
            return None
        auc_sum, auc_images, images = self.auc
        return Agreement(
            precision=both / tail if tail else None,
            recall=both / foreground if foreground else None,
            auc=float(auc_sum / auc_images) if auc_images else None,
            foreground_share=foreground / tokens,
            tail_share=tail / tokens,
            num_tokens=tokens,
            num_images=int(images),
        )


def _known_ratio(total: float, count: int) -> float | None:
    return total / count if count and not math.isnan(total) else None


def highest_variance(num_experts: int) -> float:
    """The population variance of a row that is sure of one of E experts: (E - 1) / E^2. 1 for a single expert, whose
    variance is always 0, so that a histogram still has a width."""
    return (num_experts - 1) / num_experts**2 if num_experts > 1 else 1.0


class RoutingStatistics:
    """Adds up the routing of tokens, batch after batch, by site. What is decided about images as a whole, in a connector,
    is left out: `analysis.paths` counts it.

    foreground_threshold: a token whose share of foreground reaches it is a foreground token.
    """

    def __init__(self, *, foreground_threshold: float = 0.5) -> None:
        if not 0 < foreground_threshold <= 1:
            raise ValueError(f"foreground_threshold: {foreground_threshold}; allowed: above 0, at most 1")
        self.foreground_threshold = foreground_threshold
        self._sites: dict[Site, SiteStatistics] = {}

    def __len__(self) -> int:
        return len(self._sites)

    def __getitem__(self, site: Site) -> SiteStatistics:
        return self._sites[site]

    def items(self) -> Iterator[tuple[Site, SiteStatistics]]:
        """Sites in the order of parts and layers."""
        yield from sorted(self._sites.items())

    def update(self, trace: RoutingTrace, foreground: Foreground | None = None) -> None:
        """Add one batch.

        Args:
            trace: attached or detached; of a batch with any number of images, none included.
            foreground: for every image of the batch, in the order of `image_BS`, the share of foreground in each of
                its tokens [tokens], in patch order; None for an image without a mask.

        Raises:
            ValueError: a wrong number of images, or of tokens in one; a site with another number of experts than
                before.
        """
        context = trace.context
        targets = _foreground_by_image(context, foreground)
        for site, decision in trace.of(LANGUAGE_MODEL):
            self._update_site(self._site(site, decision.probs_RE.shape[-1]), decision, context, targets)

    def _site(self, site: Site, num_experts: int) -> SiteStatistics:
        statistics = self._sites.setdefault(site, SiteStatistics.empty(num_experts))
        if statistics.num_experts != num_experts:
            raise ValueError(f"{site}: {num_experts} experts; allowed: {statistics.num_experts}, as in earlier batches")
        return statistics

    def _update_site(
        self,
        statistics: SiteStatistics,
        decision: RoutingDecision,
        context: RoutingContext,
        targets: list[tuple[NDArray[np.intp], NDArray[np.floating]]],
    ) -> None:
        routing = decision.by_token(context)
        rpv_T = routing_probability_variance(routing.probs_RE)
        tail_T = tail_flags(routing.probs_RE, context)
        statistics.load[:] += expert_load(routing, context.modality_T).cpu().numpy()
        statistics.dropped[:] += dropped_load(routing, context.modality_T).cpu().numpy()
        modality = context.modality_T.cpu().numpy()
        rpv, entropy = rpv_T.cpu().numpy(), routing_entropy(routing.probs_RE).cpu().numpy()
        tail = tail_T.cpu().numpy()
        for row, kind in enumerate(MODALITIES):
            chosen = modality == int(kind)
            statistics.tokens[row] += int(chosen.sum())
            statistics.rpv_sum[row] += rpv[chosen].sum(dtype=np.float64)
            statistics.entropy_sum[row] += entropy[chosen].sum(dtype=np.float64)
            statistics.histogram[row] += _histogram(rpv[chosen], statistics.num_experts)
        statistics.tokens[len(MODALITIES)] += int(tail.sum())
        statistics.tail_rpv_sum[0] += rpv[tail].sum(dtype=np.float64)
        for index, fraction in targets:
            is_foreground = fraction >= self.foreground_threshold
            both = int((tail[index] & is_foreground).sum())
            statistics.agreement[:] += (len(index), int(tail[index].sum()), int(is_foreground.sum()), both)
            auc = area_under_curve(rpv[index], is_foreground)
            statistics.auc[:] += (auc or 0.0, auc is not None, 1)

    def merge(self, other: RoutingStatistics) -> None:
        """Add another part of the same evaluation (another task, another rank).

        Raises:
            ValueError: different thresholds, or different numbers of experts at a site.
        """
        if other.foreground_threshold != self.foreground_threshold:
            raise ValueError(
                f"foreground_threshold: {other.foreground_threshold}; allowed: {self.foreground_threshold}, "
                "as in the statistics it is added to"
            )
        for site, theirs in other.items():
            ours = self._site(site, theirs.num_experts)
            for name in _ARRAYS:
                getattr(ours, name)[:] += getattr(theirs, name)

    def to_npz(self, path: str | Path) -> None:
        """Write everything to one .npz file (plain arrays: no pickle)."""
        arrays: dict[str, Any] = {
            "format": np.array(_FORMAT),
            "foreground_threshold": np.array(self.foreground_threshold),
            "part": np.array([site.part for site, _ in self.items()], dtype=np.str_),
            "layer": np.array([site.layer for site, _ in self.items()], dtype=np.int64),
        }
        for index, (_, statistics) in enumerate(self.items()):
            for name in _ARRAYS:
                arrays[f"{index}.{name}"] = getattr(statistics, name)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)

    @staticmethod
    def from_npz(path: str | Path) -> RoutingStatistics:
        """Read what `to_npz` wrote, or wrote before there were `dropped` and `tail_rpv_sum` (format 1).

        Raises:
            ValueError: the file is none of ours, or of another format version.
        """
        with np.load(path, allow_pickle=False) as arrays:
            version = int(arrays["format"]) if "format" in arrays else None
            if version not in (1, _FORMAT) or "layer" not in arrays:
                raise ValueError(f"{path}: routing statistics of format {version}; allowed: 1 and {_FORMAT}")
            result = RoutingStatistics(foreground_threshold=float(arrays["foreground_threshold"]))
            for index, (part, layer) in enumerate(zip(arrays["part"], arrays["layer"], strict=True)):
                held = [name for name in _ARRAYS if version == _FORMAT or name not in _SINCE_2]
                values = {name: arrays[f"{index}.{name}"] for name in held}
                if version == 1:
                    values |= {"dropped": np.zeros_like(values["load"]), "tail_rpv_sum": np.full(1, math.nan)}
                result._sites[Site(str(part), int(layer))] = SiteStatistics(**values)
        return result


def _histogram(rpv: NDArray[np.floating], num_experts: int) -> IntArray:
    """Counts [H]. Rounding can lift a variance a hair over the highest one: it belongs to the last bin."""
    top = highest_variance(num_experts)
    return np.histogram(rpv.astype(np.float64).clip(0, top), bins=NUM_BINS, range=(0.0, top))[0].astype(np.int64)


def _foreground_by_image(
    context: RoutingContext, foreground: Foreground | None
) -> list[tuple[NDArray[np.intp], NDArray[np.floating]]]:
    """(positions of the image's tokens, share of foreground in each) for every image that has a mask."""
    if foreground is None:
        return []
    is_vision_T = context.modality_T == int(Modality.VISION)
    image = torch.where(is_vision_T, context.image_T, -1).cpu().numpy()
    num_images = int(image.max(initial=-1)) + 1
    if len(foreground) != num_images:
        raise ValueError(f"foreground: {len(foreground)} images; allowed: {num_images}, as in the batch")
    targets = []
    for number, fraction in enumerate(foreground):
        if fraction is None:
            continue
        index = np.flatnonzero(image == number)
        if fraction.shape != index.shape:
            raise ValueError(
                f"foreground of image {number}: shape {fraction.shape}; allowed: ({len(index)},), its visual tokens"
            )
        targets.append((index, fraction))
    return targets
