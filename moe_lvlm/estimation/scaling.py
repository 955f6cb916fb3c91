"""How a stage scales on paper: more GPUs for the same batch (strong), or for a batch that grows with them (weak)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lvlm.analysis.plots.style import CYCLE, panels, save, styled
from moe_lvlm.estimation.plan import Plan, Planner

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
WEAK, STRONG = "weak", "strong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """kind: weak, or strong. plan: the best that fits; None where nothing does, or the batch cannot be shared out."""

    kind: str
    nodes: int
    gpus: int
    global_batch: int
    plan: Plan | None

    @property
    def samples_per_second(self) -> float | None:
        return None if self.plan is None else self.plan.estimate.samples_per_second


def scale(planner: Planner, *, nodes: Sequence[int] = NODES, advance: Callable[[], None] = lambda: None) -> list[Point]:
    """Both kinds on so many nodes.

    Weak: the recipe's batch on one node, as many times on more. Strong: the batch that the recipe has, its micro-batch cut
    where there is no longer one for each GPU.
    """
    points = []
    settings = planner.settings
    for count in nodes:
        gpus = count * planner.hardware.devices
        micro_batch = min(settings.micro_batch, max(settings.global_batch // gpus, 1))
        for kind, batch, micro in (
            (WEAK, settings.global_batch * count, settings.micro_batch),
            (STRONG, settings.global_batch, micro_batch),
        ):
            plan = _best(planner, count, batch, micro) if batch % (gpus * micro) == 0 else None
            points.append(Point(kind=kind, nodes=count, gpus=gpus, global_batch=batch, plan=plan))
            advance()
    return points


def _best(planner: Planner, nodes: int, global_batch: int, micro_batch: int) -> Plan | None:
    stage = planner.settings.model_copy(update={"global_batch": global_batch, "micro_batch": micro_batch})
    stages = tuple(stage if place == planner.stage else one for place, one in enumerate(planner.recipe.stages))
    recipe = planner.recipe.model_copy(update={"stages": stages})
    fitting, _ = replace(planner, recipe=recipe, nodes=nodes).search()
    return fitting[0] if fitting else None


def efficiency(points: Sequence[Point], kind: str) -> dict[int, float]:
    """Samples a second and GPU by GPUs, the smallest number's being 1."""
    rates = {point.gpus: point.samples_per_second for point in points if point.kind == kind}
    found = {gpus: rate / gpus for gpus, rate in rates.items() if rate is not None}
    first = found[min(found)] if found else 1.0
    return {gpus: rate / first for gpus, rate in found.items()}


def scaling_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    records = []
    for point in points:
        plan = point.plan
        record: dict[str, Any] = {
            "kind": point.kind,
            "gpus": point.gpus,
            "global_batch": point.global_batch,
            "efficiency": efficiency(points, point.kind).get(point.gpus),
        }
        if plan is not None:
            record |= {
                "micro_batch": plan.choice.micro_batch,
                "deepspeed": plan.choice.deepspeed,
                "expert_parallel_size": plan.choice.expert_parallel_size,
                "gradient_checkpointing": plan.choice.checkpointed,
                "step_seconds": plan.estimate.total_seconds,
                "samples_per_second": plan.estimate.samples_per_second,
                "mfu_needed": plan.estimate.mfu,
                "device_bytes": plan.peak.memory.device,
                "seconds": dict(plan.estimate.seconds),
            }
        records.append(record)
    return records


def scaling_page(points: Sequence[Point]) -> str:
    """A table of both kinds, Markdown."""
    lines = [
        "| scaling | GPUs | batch | micro-batch | ZeRO, EP, checkpointed | GiB | ms a step | samples/s | efficiency |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in (WEAK, STRONG):
        reached = efficiency(points, kind)
        for point in (one for one in points if one.kind == kind):
            if (plan := point.plan) is None:
                why = "nothing fits" if point.global_batch >= point.gpus else "not a sample for each GPU"
                lines.append(f"| {kind} | {point.gpus:,} | {point.global_batch:,} | | {why} | | | | |")
                continue
            choice = plan.choice
            setting = f"{choice.deepspeed}, {choice.expert_parallel_size}, {str(choice.checkpointed).lower()}"
            lines.append(
                f"| {kind} | {point.gpus:,} | {point.global_batch:,} | {choice.micro_batch} | {setting} | "
                f"{plan.peak.memory.device / 2**30:.0f} | {plan.estimate.total_seconds * 1000:,.0f} | "
                f"{plan.estimate.samples_per_second:,.0f} | {reached[point.gpus]:.0%} |"
            )
    return "\n".join(lines)


def scaling_figure(curves: dict[str, Sequence[Point]], path: Path) -> None:
    """Efficiency over GPUs, a panel each for weak and strong scaling, a line a name."""
    with styled():
        figure, axes = panels(2, max_columns=2, width=4.0, height=3.0)
        for axis, kind in zip(axes, (WEAK, STRONG), strict=True):
            for (name, points), color in zip(curves.items(), CYCLE, strict=False):
                reached = efficiency(points, kind)
                axis.plot(list(reached), list(reached.values()), "o-", color=color, label=name, markersize=3.5)
            axis.set_xscale("log", base=2)
            axis.set_ylim(0, 1.1)
            axis.set_xlabel("GPUs")
            axis.set_ylabel("samples/s a GPU, first point = 1")
            axis.set_title(f"{kind} scaling, on paper")
            axis.legend()
        save(figure, path)
