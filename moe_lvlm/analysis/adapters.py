"""Which LoRA experts samples take, and with what gate, by dataset or task and by cluster (MoCLE figures 5 to 7).

N samples   T tokens   R decided rows (samples, or tokens)   L adapted linears   E experts, without the universal one
K experts of a row   D subsets: datasets or tasks
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_lvlm.analysis.json_object import read_object, whole_numbers
from moe_lvlm.config.adapter import Gating
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingDecision, Site

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_PREFIX = "adapter."
_FORMAT = 1
_KEYS = ("format", "gating", "has_universal", "num_experts", "linears", "subsets", "clusters")
_SUBSET_KEYS = ("samples", "clusters", "experts", "rows", "gate_sum", "gate_square_sum")


def is_adapter(site: Site) -> bool:
    """Whether a site is an adapted linear's."""
    return site.part.startswith(_PREFIX)


def linear_name(site: Site) -> str:
    """The name of an adapted linear in its decoder layer, `self_attn.q_proj`."""
    return site.part.removeprefix(_PREFIX)


@dataclass(slots=True)
class SubsetCounts:
    """What was counted of one dataset or task.

    samples: how many. clusters: by the row of the table that their gates read; one whose row is not known has none.
    experts_LE: kept slots by linear and expert. rows_L: decided rows, of samples or of tokens. gate_sum_L,
    gate_square_sum_L: of the largest gate of each row.
    """

    samples: int
    clusters: Counter[int]
    experts_LE: IntArray
    rows_L: IntArray
    gate_sum_L: FloatArray
    gate_square_sum_L: FloatArray

    @staticmethod
    def empty(num_linears: int, num_experts: int) -> SubsetCounts:
        whole, real = np.zeros(num_linears, dtype=np.int64), np.zeros(num_linears)
        return SubsetCounts(
            0, Counter(), np.zeros((num_linears, num_experts), dtype=np.int64), whole, real, real.copy()
        )

    @property
    def gate_L(self) -> FloatArray:
        """Mean of the largest gate at each linear."""
        return self.gate_sum_L / self.rows_L

    @property
    def gate(self) -> tuple[float, float]:
        """Mean and standard deviation of the largest gate over rows and linears, each row as much."""
        rows = float(self.rows_L.sum())
        mean = float(self.gate_sum_L.sum()) / rows
        return mean, math.sqrt(max(float(self.gate_square_sum_L.sum()) / rows - mean**2, 0.0))

    @property
    def expert_shares_LE(self) -> FloatArray:
        """Share of each linear's slots that every expert gets."""
        return self.experts_LE / self.experts_LE.sum(axis=1, keepdims=True)

    def add(self, other: SubsetCounts) -> None:
        self.samples += other.samples
        self.clusters.update(other.clusters)
        self.experts_LE += other.experts_LE
        self.rows_L += other.rows_L
        self.gate_sum_L += other.gate_sum_L
        self.gate_square_sum_L += other.gate_square_sum_L


@dataclass(slots=True)
class AdapterStatistics:
    """Counts of LoRA experts' decisions, batch after batch: a state of fixed size a dataset and a cluster.

    gating, has_universal: as in the settings of the adapters. linears: in the model's order, known from the first
    batch. subsets: by name, in the order in which they came. by_cluster: kept slots by linear and expert, [L, E], of
    all samples of a cluster (of a dataset of the mixture, where that is what gates read).
    """

    gating: Gating
    has_universal: bool
    num_experts: int = 0
    linears: tuple[Site, ...] = ()
    subsets: dict[str, SubsetCounts] = field(default_factory=dict)
    by_cluster: dict[int, IntArray] = field(default_factory=dict)

    def __len__(self) -> int:
        """Samples."""
        return sum(subset.samples for subset in self.subsets.values())

    def update(self, trace: RoutingTrace, names: Sequence[str]) -> None:
        """Add one batch. A trace without adapted linears adds nothing.

        names: the dataset or task of each sample of the batch, in their order.

        Raises:
            ValueError: another number of names than of samples; decisions about images; other linears or experts than
                before.
        """
        found = [(site, decision) for site, decision in trace.items() if is_adapter(site)]
        if not found:
            return
        context = trace.context
        if len(names) != (num_samples := context.count_samples()):
            raise ValueError(f"names: {len(names)}; allowed: {num_samples}, one a sample of the batch")
        self._settle(tuple(site for site, _ in found), {decision.probs_RE.shape[1] for _, decision in found})
        if not names:  # a batch of padding
            return
        row_N = context.dataset_N if self.gating == "dataset" else context.cluster_N
        clusters = [-1] * len(names) if row_N is None else row_N[: len(names)].tolist()
        keys = [*dict.fromkeys(zip(names, clusters, strict=True))]
        key_N = np.array([keys.index(pair) for pair in zip(names, clusters, strict=True)], dtype=np.int64)
        parts = [SubsetCounts.empty(len(found), self.num_experts) for _ in keys]
        for part, (_, cluster), count in zip(parts, keys, np.bincount(key_N, minlength=len(keys)), strict=True):
            part.samples = int(count)
            if cluster >= 0:
                part.clusters[cluster] = int(count)
        for place, (site, decision) in enumerate(found):
            self._count(parts, place, decision, key_N[_owners(site, decision, context.sample_T)])
        for part, (name, cluster) in zip(parts, keys, strict=True):
            self._subset(name).add(part)
            if cluster >= 0:
                self._add_to_cluster(cluster, part.experts_LE)

    def _count(self, parts: Sequence[SubsetCounts], place: int, decision: RoutingDecision, key_R: IntArray) -> None:
        """Add one linear's decision. key_R: which part each row belongs to; rows that are no token are left out."""
        keep_RK = decision.keep_RK.cpu().numpy()
        is_row_R = keep_RK.any(axis=1)
        gate_R = decision.weights_RK[:, 0].double().cpu().numpy()[is_row_R]
        slot_A = (key_R[:, None] * self.num_experts + decision.expert_ids_RK.cpu().numpy())[keep_RK]
        key_R = key_R[is_row_R]
        experts = np.bincount(slot_A, minlength=len(parts) * self.num_experts).reshape(len(parts), -1)
        rows = np.bincount(key_R, minlength=len(parts))
        sums = np.bincount(key_R, weights=gate_R, minlength=len(parts))
        squares = np.bincount(key_R, weights=gate_R**2, minlength=len(parts))
        for part, *values in zip(parts, experts, rows, sums, squares, strict=True):
            part.experts_LE[place], part.rows_L[place] = values[0], values[1]
            part.gate_sum_L[place], part.gate_square_sum_L[place] = values[2], values[3]

    def merge(self, other: AdapterStatistics) -> None:
        """Add another part of the same evaluation (another set).

        Raises:
            ValueError: other settings, linears or experts.
        """
        mine, theirs = (self.gating, self.has_universal), (other.gating, other.has_universal)
        if mine != theirs:
            raise ValueError(f"gating and has_universal: {theirs}; allowed: {mine}, as before")
        if other.linears:
            self._settle(other.linears, {other.num_experts})
        for name, subset in other.subsets.items():
            self._subset(name).add(subset)
        for cluster, experts_LE in other.by_cluster.items():
            self._add_to_cluster(cluster, experts_LE)

    def experts_by_subset(self, place: int) -> IntArray:
        """Slots at one linear by subset and expert, [D, E]. place: of the linear in `linears`."""
        return np.array([subset.experts_LE[place] for subset in self.subsets.values()], dtype=np.int64)

    def clusters_by_subset(self) -> IntArray:
        """Samples by subset and cluster, [D, clusters]; the clusters are those that some sample has, ascending."""
        seen = sorted({cluster for subset in self.subsets.values() for cluster in subset.clusters})
        return np.array(
            [[subset.clusters[cluster] for cluster in seen] for subset in self.subsets.values()], dtype=np.int64
        )

    def _settle(self, linears: tuple[Site, ...], experts: set[int]) -> None:
        """The first batch says what is adapted; later ones have to agree."""
        if len(experts) != 1:
            raise ValueError(
                f"linears of {' and '.join(map(str, sorted(experts)))} experts; allowed: one number for all"
            )
        (num_experts,) = experts
        if self.linears and (linears, num_experts) != (self.linears, self.num_experts):
            raise ValueError(
                f"{len(linears)} linears of {num_experts} experts; allowed: the {len(self.linears)} of "
                f"{self.num_experts} experts as before, in the same order"
            )
        self.linears, self.num_experts = linears, num_experts

    def _subset(self, name: str) -> SubsetCounts:
        return self.subsets.setdefault(name, SubsetCounts.empty(len(self.linears), self.num_experts))

    def _add_to_cluster(self, cluster: int, experts_LE: IntArray) -> None:
        self.by_cluster[cluster] = self.by_cluster.get(cluster, 0) + experts_LE

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        subsets = {
            name: {
                "samples": subset.samples,
                "clusters": {str(cluster): count for cluster, count in sorted(subset.clusters.items())},
                "experts": subset.experts_LE.tolist(),
                "rows": subset.rows_L.tolist(),
                "gate_sum": subset.gate_sum_L.tolist(),
                "gate_square_sum": subset.gate_square_sum_L.tolist(),
            }
            for name, subset in self.subsets.items()
        }
        content = {
            "format": _FORMAT,
            "gating": self.gating,
            "has_universal": self.has_universal,
            "num_experts": self.num_experts,
            "linears": [[site.part, site.layer] for site in self.linears],
            "subsets": subsets,
            "clusters": {str(cluster): counts.tolist() for cluster, counts in sorted(self.by_cluster.items())},
        }
        Path(path).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> AdapterStatistics:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is none of ours, of another format version, or its tables do not fit its linears.
        """
        content = read_object(Path(path), what="adapter statistics", version=_FORMAT, keys=_KEYS)
        gating, has_universal = content["gating"], content["has_universal"]
        if gating not in ("cluster", "dataset", "sentence", "token") or not isinstance(has_universal, bool):
            raise ValueError(
                f"{path}: gating {gating!r}, has_universal {has_universal!r}; allowed: cluster, dataset, sentence or "
                "token, and true or false"
            )
        (num_experts,) = whole_numbers([content["num_experts"]], at_least=0, where=f"{path}: num_experts")
        result = AdapterStatistics(gating, has_universal, num_experts, _read_linears(content["linears"], path))
        shape = (len(result.linears), num_experts)
        for name, subset in _items(content["subsets"], f"{path}: subsets"):
            result.subsets[name] = _read_subset(subset, shape, f"{path}: subset {name!r}")
        for label, table in _items(content["clusters"], f"{path}: clusters"):
            cluster = _cluster_of(label, f"{path}: clusters")
            result.by_cluster[cluster] = _read_table(table, shape, f"{path}: cluster {cluster}")
        return result


def _owners(site: Site, decision: RoutingDecision, sample_T: Tensor) -> IntArray:
    """The sample of each decided row; any of them at padding, which is not kept.

    Raises:
        ValueError: a decision about images.
    """
    if decision.level == "sample":
        return np.arange(decision.probs_RE.shape[0])
    if decision.level == "token":
        return sample_T.clamp(min=0).long().cpu().numpy()
    raise ValueError(f"{site}: decides about images; allowed: samples or tokens")


def _read_linears(values: Any, path: str | Path) -> tuple[Site, ...]:
    try:
        linears = tuple(Site(part, layer) for part, layer in values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: linears: {values!r}; allowed: a list of names with layers") from error
    for site in linears:
        if not (isinstance(site.part, str) and is_adapter(site) and type(site.layer) is int and site.layer >= 0):
            raise ValueError(f"{path}: linears: {site!r}; allowed: a name from `{_PREFIX}` on, and a layer from 0")
    return linears


def _read_subset(values: Any, shape: tuple[int, int], where: str) -> SubsetCounts:
    if not isinstance(values, dict) or set(values) != set(_SUBSET_KEYS):
        raise ValueError(f"{where}: allowed: exactly {', '.join(_SUBSET_KEYS)}")
    clusters = {_cluster_of(label, where): count for label, count in _items(values["clusters"], where)}
    (samples, *counts) = whole_numbers([values["samples"], *clusters.values()], at_least=1, where=where)
    if sum(counts) > samples:
        raise ValueError(f"{where}: {sum(counts)} samples with a cluster; allowed: {samples}, all that there are")
    rows = whole_numbers(values["rows"], at_least=1, where=where)
    sums = [_read_numbers(values[name], where) for name in ("gate_sum", "gate_square_sum")]
    if any(size != shape[0] for size in (len(rows), *map(len, sums))):
        raise ValueError(f"{where}: rows and gates; allowed: {shape[0]} numbers each, one a linear")
    experts_LE = _read_table(values["experts"], shape, where)
    return SubsetCounts(samples, Counter(clusters), experts_LE, np.array(rows, dtype=np.int64), *sums)


def _read_table(values: Any, shape: tuple[int, int], where: str) -> IntArray:
    """Whole numbers [L, E]."""
    rows = [whole_numbers(row, at_least=0, where=where) for row in values] if isinstance(values, list) else []
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        raise ValueError(f"{where}: counts of experts; allowed: {shape[0]} rows, one a linear, of {shape[1]} experts")
    return np.array(rows, dtype=np.int64).reshape(shape)


def _read_numbers(values: Any, where: str) -> FloatArray:
    if not isinstance(values, list) or not all(type(value) in (int, float) and value >= 0 for value in values):
        raise ValueError(f"{where}: {values!r}; allowed: numbers from 0")
    return np.array(values, dtype=np.float64)


def _items(values: Any, where: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r}; allowed: an object")
    yield from values.items()


def _cluster_of(label: str, where: str) -> int:
    if not label.isdecimal() or str(int(label)) != label:
        raise ValueError(f"{where}: cluster {label!r}; allowed: a whole number from 0")
    return int(label)
