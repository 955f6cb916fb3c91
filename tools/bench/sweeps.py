"""What is swept, and the points of each sweep: problems, our layer on each, and a dense FFN of as many FLOPs.

T tokens   D model width   E experts   F FFN width   K experts a token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bench.check import CHECK_TOKENS, check_variants
from bench.layers import BenchLayer, SwiGLU, ours_long_tail, ours_top_k
from bench.problem import Problem, Sizes, draw_problem, routing_probabilities, with_load, with_tail
from bench.variants import Computes, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepKind:
    """How a sweep is called and drawn, and what it should stay below.

    values: what is swept unless other values are given.
    is_by_row: whether a point's time is divided by its routed rows before it is compared with the first point's.
    goal: a point's highest ratio by its value and the sizes of the sweep, None where none is set.
    """

    title: str
    axis: str
    values: tuple[float, ...]
    goal: Callable[[float, Sizes], float | None]
    is_by_row: bool = False
    is_log: bool = False

    @property
    def measure(self) -> str:
        """What a ratio compares."""
        return "time of a routed row" if self.is_by_row else "time"


def _tail_goal(share: float, sizes: Sizes) -> float:
    """1.03 x the rows; at K = 2 of 4 experts 1.03 x (1 + share)."""
    return 1.03 * (1 + share * (sizes.experts - sizes.top_k) / sizes.top_k)


KINDS: dict[str, SweepKind] = {
    "experts": SweepKind(
        title="Number of experts",
        axis="experts (tokens, top-k and widths the same)",
        values=(4, 8, 16, 32, 64),
        goal=lambda value, sizes: 1.35,
        is_by_row=True,
        is_log=True,
    ),
    "tokens": SweepKind(
        title="Number of tokens",
        axis="tokens",
        values=(1024, 2048, 4096, 8192),
        goal=lambda value, sizes: None,
        is_by_row=True,
        is_log=True,
    ),
    "tail": SweepKind(
        title="LTDR's tail",
        axis="share of tokens on all experts",
        values=(0, 0.05, 0.13, 0.3, 0.5, 1),
        goal=_tail_goal,
    ),
    "skew": SweepKind(
        title="Skewed load",
        axis="share of tokens that take one expert",
        values=(0.5, 0.7, 0.9, 1),
        goal=lambda value, sizes: 1.05 if value <= 0.7 else None,
    ),
    "ranks": SweepKind(
        title="Expert parallelism",
        axis="processes (each with its own tokens)",
        values=(1, 2, 4),
        goal=lambda value, sizes: None,
        is_log=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting of a sweep. rows: routed rows of a pass."""

    sweep: str
    value: float
    problem: Problem
    rows: int
    build: Callable[[Problem], BenchLayer]
    computes: Computes

    @property
    def name(self) -> str:
        return f"{self.sweep} {self.value:g}"

    @property
    def floor_name(self) -> str:
        """The same for points whose floors are."""
        return f"dense of {self.problem.sizes.tokens} tokens, {self.rows} rows"

    @property
    def busiest_share(self) -> float:
        """Share of tokens that take the expert which most take, under plain top-k."""
        sizes = self.problem.sizes
        best_TK = routing_probabilities(self.problem.x_BSD[0], self.problem.gate_ED).topk(sizes.top_k, dim=-1).indices
        return float(torch.bincount(best_TK.flatten()).max() / sizes.tokens)

    def layer(self) -> nn.Module:
        return self.build(self.problem).train()

    def floor(self) -> nn.Module:
        """A dense FFN whose matrix products cost as much as the point's rows, to the next number of hidden units; of wide
        ones to the next 64, since a GPU is several times slower at odd widths."""
        sizes, weights = self.problem.sizes, self.problem
        step = 64 if sizes.ffn_width >= 1024 else 1
        width = step * round(sizes.ffn_width * self.rows / sizes.tokens / step)
        return SwiGLU(
            weights.w1_EFD.flatten(0, 1)[:width],
            weights.w2_EDF.transpose(0, 1).flatten(1)[:, :width],
            weights.w3_EFD.flatten(0, 1)[:width],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all points share beside their sizes."""

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    seed: int

    def draw(self, **sizes: float) -> Problem:
        """A problem with some of the sizes changed."""
        given = replace(self.sizes, **sizes)  # type: ignore[arg-type]
        return draw_problem(given, dtype=self.dtype, device=self.device, seed=self.seed)


def experts_points(setting: Setting, values: Sequence[float]) -> list[Point]:
    """More experts for the same rows: tokens, K and F stay, and the load is even. The most weights are drawn once."""
    numbers = [whole_number("experts", value) for value in values]
    largest = setting.draw(experts=max(numbers), tail_share=0.0)
    points = []
    for number in numbers:
        part = replace(
            largest,
            sizes=replace(largest.sizes, experts=number),
            gate_ED=largest.gate_ED[:number],
            w1_EFD=largest.w1_EFD[:number],
            w2_EDF=largest.w2_EDF[:number],
            w3_EFD=largest.w3_EFD[:number],
        )
        points.append(_top_k_point("experts", number, with_load(part, None, seed=setting.seed)))
    return points


def tokens_points(setting: Setting, values: Sequence[float]) -> list[Point]:
    """More tokens, the load even."""
    return [
        _top_k_point(
            "tokens",
            value,
            with_load(setting.draw(tokens=whole_number("tokens", value), tail_share=0.0), None, seed=setting.seed),
        )
        for value in values
    ]


def skew_points(setting: Setting, values: Sequence[float]) -> list[Point]:
    """A share of the tokens takes expert 0 (and K - 1 others); first a share of K / E, an even load."""
    problem = setting.draw(tail_share=0.0)
    even = setting.sizes.top_k / setting.sizes.experts
    points = [_top_k_point("skew", even, with_load(problem, None, seed=setting.seed))]
    for value in values:
        if value < even:
            raise ValueError(f"--points: skew={value:g}; allowed: {even:g} (an even load) and above")
        if value > even:
            points.append(_top_k_point("skew", value, with_load(problem, value, seed=setting.seed)))
    return points


def tail_points(setting: Setting, values: Sequence[float]) -> list[Point]:
    """LTDR with a share of the tokens on all experts: plain top-k at 0, elsewhere LTDR's router with tokens of which it
    picks that share. At 1, where no mean can lie below all tokens, its router has K = E."""
    problem = setting.draw(tail_share=0.0)
    sizes = problem.sizes
    points = []
    if values[0] != 0:
        raise ValueError(f"--points: tail={values[0]:g} first; allowed: 0, plain top-k, with which all are compared")
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"--points: tail={value:g}; allowed: 0 to 1")
        own = with_tail(problem, 0.0 if value == 1 else value, seed=setting.seed)
        if value == 0:
            points.append(_top_k_point("tail", 0, own))
            continue
        if value == 1:
            own = replace(own, sizes=replace(own.sizes, top_k=sizes.experts))
        rows = own.sizes.tokens * own.sizes.top_k + own.sizes.num_tail * (sizes.experts - own.sizes.top_k)
        points.append(Point(sweep="tail", value=value, problem=own, rows=rows, build=ours_long_tail, computes="ltdr"))
    return points


BUILDERS: dict[str, Callable[[Setting, Sequence[float]], list[Point]]] = {
    "experts": experts_points,
    "tokens": tokens_points,
    "tail": tail_points,
    "skew": skew_points,
}


def check_points(setting: Setting, sweep: str, values: Sequence[float]) -> None:
    """Hold our layer at each point of a sweep, with few tokens, to a plain computation.

    Raises:
        CheckError: a result is wrong.
    """
    small = replace(setting, sizes=replace(setting.sizes, tokens=min(setting.sizes.tokens, CHECK_TOKENS)))
    for point in BUILDERS[sweep](small, _small_values(sweep, values)):
        variant = Variant(name=point.name, label=point.name, build=point.build, computes=point.computes, is_ours=True)
        check_variants((variant,), point.problem)


def _small_values(sweep: str, values: Sequence[float]) -> Sequence[float]:
    return [min(value, CHECK_TOKENS) for value in values] if sweep == "tokens" else values


def _top_k_point(sweep: str, value: float, problem: Problem) -> Point:
    rows = problem.sizes.tokens * problem.sizes.top_k
    return Point(sweep=sweep, value=value, problem=problem, rows=rows, build=ours_top_k, computes="top_k")


def whole_number(name: str, value: float) -> int:
    """A sweep's value, which must be one.

    Raises:
        ValueError: it is not.
    """
    if value != int(value):
        raise ValueError(f"--points: {name}={value:g}; allowed: whole numbers")
    return int(value)
