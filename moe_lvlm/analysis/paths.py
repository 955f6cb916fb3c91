"""Expert paths of a connector by task, and how much a path says about the task (Q-MoE figure 3).

I images   L Task-Experts layers   E experts   P paths   N tasks
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_lvlm.analysis.json_object import read_object, whole_numbers
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import CONNECTOR, RoutingDecision, Site

ExpertPath = tuple[int, ...]
"""The expert of every Task-Experts layer, the lowest layer first."""

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_FORMAT = 1
_KEYS = ("format", "layers", "num_experts", "counts")
# Sums of logarithms in another order differ in their last digits.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class TaskInformation:
    """What the path tells of the task, in nats.

    measured: mutual information between path and task. by_chance: its mean where tasks are shuffled among images, which
    is above 0, since few images never spread evenly. highest: the entropy of the task, reached if every path belongs to
    one task. num_reached: shuffles that reach `measured`, of num_shuffles.
    """

    measured: float
    by_chance: float
    highest: float
    num_reached: int
    num_shuffles: int

    @property
    def p_value(self) -> float:
        """Of the permutation test: the chance of so much information where path and task have nothing to do with each
        other. Never 0, since the images as they are count as one shuffle."""
        return (self.num_reached + 1) / (self.num_shuffles + 1)


class PathStatistics:
    """Counts images by task and path, batch after batch. A sample with two images counts twice."""

    def __init__(self) -> None:
        self.layers: tuple[int, ...] = ()
        self.num_experts = 0
        self._counts: dict[str, Counter[ExpertPath]] = {}

    def __len__(self) -> int:
        """Images."""
        return sum(count.total() for count in self._counts.values())

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(self._counts)

    def counts(self, task: str) -> Counter[ExpertPath]:
        """Images of one task by path."""
        return self._counts[task]

    def overall(self) -> Counter[ExpertPath]:
        """Images of all tasks by path."""
        total: Counter[ExpertPath] = Counter()
        for counts in self._counts.values():
            total.update(counts)
        return total

    def update(self, trace: RoutingTrace, tasks: Sequence[str]) -> None:
        """Add one batch. A trace without decisions of a connector adds nothing.

        tasks: one for each image of the batch, in their order; rows that stand for no image (keep_RK) have none.

        Raises:
            ValueError: another number of tasks than of images; layers that differ in their images or in their number of
                experts; several experts in one layer; other layers or experts than before.
        """
        found = {site: trace[site] for site in sorted(site for site, _ in trace.of(CONNECTOR))}
        if not found:
            return
        paths_IL = _taken_paths(found).tolist()
        if len(tasks) != len(paths_IL):
            raise ValueError(f"tasks: {len(tasks)} names; allowed: {len(paths_IL)}, one an image of the batch")
        experts = {decision.probs_RE.shape[1] for decision in found.values()}
        if len(experts) != 1:
            raise ValueError(
                f"layers of {' and '.join(map(str, sorted(experts)))} experts; allowed: one number for all"
            )
        self._settle(tuple(site.layer for site in found), experts.pop())
        for task, path in zip(tasks, paths_IL, strict=True):
            self._counts.setdefault(task, Counter())[tuple(path)] += 1

    def merge(self, other: PathStatistics) -> None:
        """Add another part of the same evaluation (another set, another rank).

        Raises:
            ValueError: other layers, or another number of experts.
        """
        if other.layers:
            self._settle(other.layers, other.num_experts)
        for task in other.tasks:
            self._counts.setdefault(task, Counter()).update(other.counts(task))

    def _settle(self, layers: tuple[int, ...], num_experts: int) -> None:
        """The first batch says what the connector is like; later ones have to agree."""
        if self.layers and (layers, num_experts) != (self.layers, self.num_experts):
            raise ValueError(
                f"paths over layers {list(layers)} of {num_experts} experts; allowed: layers {list(self.layers)} of "
                f"{self.num_experts} experts, as before"
            )
        self.layers, self.num_experts = layers, num_experts

    def top_paths(self, limit: int) -> list[ExpertPath]:
        """Up to so many paths, the most frequent first, ties by the lowest experts.

        A path is ranked by its share of a task's images, mean over tasks: evaluation sets differ in size a
        hundredfold, and a small one would not show in a rank by images (the paper does not say how it ranks).
        """
        paths = sorted(self.overall())
        if not paths:
            return []
        # Rounded, so that equal means stay equal whatever the order of their sums.
        rank = self.shares(paths)[:-1].mean(axis=1).round(12)
        return [paths[index] for index in np.argsort(-rank, kind="stable")[:limit]]

    def shares(self, paths: Sequence[ExpertPath]) -> FloatArray:
        """Share of each task's images that takes each path: [P + 1, N], the last row for all other paths."""
        table = np.array([[counts[path] for counts in self._counts.values()] for path in paths], dtype=np.float64)
        table = table.reshape(len(paths), len(self._counts))
        total = np.array([counts.total() for counts in self._counts.values()], dtype=np.float64)
        return np.vstack([table, total - table.sum(axis=0)]) / total

    def expert_load(self, task: str) -> IntArray:
        """Images of one task that each expert gets, [L, E]."""
        load = np.zeros((len(self.layers), self.num_experts), dtype=np.int64)
        for path, count in self._counts[task].items():
            load[np.arange(len(path)), path] += count
        return load

    def task_information(self, *, num_shuffles: int = 1000, seed: int = 0) -> TaskInformation:
        """Mutual information between path and task, beside what chance gives.

        Tasks are shuffled among images `num_shuffles` times, which leaves the number of images of every task and of
        every path as it is. Only the table of counts is drawn, row by row, so that the time depends on paths and tasks,
        not on images. Images count as independent: many questions about one picture make the test too sure of itself.
        """
        paths = sorted(self.overall())
        table_NP = np.array([[counts[path] for path in paths] for counts in self._counts.values()], dtype=np.int64)
        return shared_information(table_NP, num_shuffles=num_shuffles, seed=seed)

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file."""
        counts = {
            task: {path_label(taken): count for taken, count in sorted(of_task.items())}
            for task, of_task in self._counts.items()
        }
        content = {"format": _FORMAT, "layers": self.layers, "num_experts": self.num_experts, "counts": counts}
        Path(path).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> PathStatistics:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is none of ours, of another format version, or holds a path that its layers and
                experts do not allow.
        """
        content = read_object(Path(path), what="expert paths", version=_FORMAT, keys=_KEYS)
        result = PathStatistics()
        result.layers = tuple(whole_numbers(content["layers"], at_least=0, where=f"{path}: layers"))
        (result.num_experts,) = whole_numbers([content["num_experts"]], at_least=0, where=f"{path}: num_experts")
        if list(result.layers) != sorted(set(result.layers)):
            raise ValueError(f"{path}: layers: {list(result.layers)}; allowed: each once, ascending")
        if not isinstance(content["counts"], dict):
            raise ValueError(f"{path}: counts: {content['counts']!r}; allowed: an object, counts of paths by task")
        if not (result.layers and result.num_experts) and any((result.layers, result.num_experts, content["counts"])):
            raise ValueError(
                f"{path}: layers or num_experts is empty; allowed: only if all is, where nothing was counted"
            )
        for task, counts in content["counts"].items():
            where = f"{path}: counts of task {task!r}"
            if not isinstance(counts, dict) or not counts:
                raise ValueError(f"{where}: {counts!r}; allowed: an object, at least one path with its count")
            paths = [result._parse(label, where) for label in counts]
            numbers = whole_numbers(list(counts.values()), at_least=1, where=where)
            result._counts[task] = Counter(dict(zip(paths, numbers, strict=True)))
        return result

    def _parse(self, label: str, where: str) -> ExpertPath:
        """`path_label` undone."""
        path = tuple(int(part) for part in label.split("-") if part.isdecimal() and int(part) < self.num_experts)
        if len(path) != len(self.layers) or path_label(path) != label:
            raise ValueError(
                f"{where}: path {label!r}; allowed: an expert from 0 to {self.num_experts - 1} for each of "
                f"{len(self.layers)} layers, joined as in 1-0-2"
            )
        return path


def path_label(path: ExpertPath) -> str:
    """(1, 0, 2) -> 1-0-2."""
    return "-".join(map(str, path))


def _taken_paths(decisions: Mapping[Site, RoutingDecision]) -> Tensor:
    """[I, L] expert ids of the images that are some. Decisions in the order of layers."""
    site, first = next(iter(decisions.items()))
    for other, decision in decisions.items():
        if decision.expert_ids_RK.shape[1] != 1:
            raise ValueError(f"{other}: {decision.expert_ids_RK.shape[1]} experts an image; allowed: 1, as a path has")
        if not torch.equal(decision.keep_RK, first.keep_RK):
            raise ValueError(f"{other}: decides about other images than {site}; allowed: the same ones")
    return torch.cat([decision.expert_ids_RK for decision in decisions.values()], dim=1)[first.keep_RK[:, 0]]


def shared_information(table: IntArray, *, num_shuffles: int = 1000, seed: int = 0) -> TaskInformation:
    """What the column tells of the row of things that a table counts, beside what chance gives.

    Rows are shuffled among things, which leaves the sums of rows and columns as they are. Only the table is drawn, row by
    row, so that the time depends on its size, not on the number of things. Things count as independent of each other.
    """
    if not table.size:
        return TaskInformation(0.0, 0.0, 0.0, num_shuffles, num_shuffles)
    measured = mutual_information(table)
    random = np.random.default_rng(seed)
    shuffled = np.array([mutual_information(_shuffle(table, random)) for _ in range(num_shuffles)])
    return TaskInformation(
        measured=measured,
        by_chance=float(shuffled.mean()),
        highest=entropy(table.sum(axis=1)),
        num_reached=int((shuffled >= measured - _ROUNDING).sum()),
        num_shuffles=num_shuffles,
    )


def mutual_information(table: IntArray) -> float:
    """Between the row and the column of things that a table counts, in nats; the estimate from counts as they are, which
    is too high where counts are few."""
    return max(entropy(table.sum(axis=0)) + entropy(table.sum(axis=1)) - entropy(table.ravel()), 0.0)


def entropy(counts: IntArray) -> float:
    """Of the shares of these counts, in nats."""
    kept = counts[counts > 0].astype(np.float64)
    total = float(kept.sum())
    return math.log(total) - float((kept * np.log(kept)).sum()) / total


def _shuffle(table_NP: IntArray, random: np.random.Generator) -> IntArray:
    """Counts after tasks are dealt out anew among images: tasks draw their images in turn, without putting back."""
    left_P = table_NP.sum(axis=0)
    drawn = np.empty_like(table_NP)
    for row, size in enumerate(table_NP.sum(axis=1)):
        drawn[row] = random.multivariate_hypergeometric(left_P, int(size), method="marginals")
        left_P = left_P - drawn[row]
    return drawn
