"""An estimate as a page and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moe_lvlm.estimation.hardware import GIB, Hardware
from moe_lvlm.estimation.plan import Plan, Planner

_MIB = 2**20


def estimate_json(planner: Planner, plan: Plan, fitting: Sequence[Plan], short: Sequence[Plan]) -> dict[str, Any]:
    """All numbers of an estimate; bytes and seconds."""
    hardware = planner.hardware
    return {
        "recipe": planner.recipe.name,
        "stage": planner.settings.name,
        "hardware": {"gpu": hardware.name, "nodes": planner.nodes, "gpus": planner.world_size},
        "assumptions": _assumptions(planner, plan),
        "as_it_stands": _plan_json(plan, planner),
        "fitting": [_plan_json(one, planner) for one in fitting],
        "not_fitting": [_plan_json(one, planner) for one in short],
    }


def _assumptions(planner: Planner, plan: Plan) -> dict[str, Any]:
    lengths, batches, reached = planner.lengths, plan.batches, planner.hardware.efficiency
    return {
        "mean_text_tokens": lengths.mean_text,
        "text_only_share": lengths.text_only,
        "images_a_sample": lengths.images,
        "tail_share": planner.tail_share,
        "batching": planner.recipe.data.batching,
        "padding": batches.padding,
        "imbalance": batches.imbalance,
        "typical_tokens": batches.typical.tokens,
        "largest_positions": batches.largest.positions,
        "efficiency": {
            "products": reached.products,
            "attention": reached.attention,
            "memory": reached.memory,
            "links": reached.links,
        },
    }


def _plan_json(plan: Plan, planner: Planner) -> dict[str, Any]:
    estimate = plan.estimate
    return {
        "overrides": plan.choice.overrides(planner.stage),
        "fits": plan.missing(planner.hardware) <= 0,
        "device_bytes": plan.peak.memory.device,
        "host_bytes": plan.peak.memory.host,
        "memory": plan.peak.memory.rows,
        "seconds": dict(estimate.seconds),
        "step_seconds": estimate.total_seconds,
        "samples_per_second": estimate.samples_per_second,
        "tokens_per_second": estimate.tokens_per_second,
        "mfu_needed": estimate.mfu,
        "mfu_six_n": estimate.mfu_six_n,
    }


def estimate_page(planner: Planner, plan: Plan, fitting: Sequence[Plan], short: Sequence[Plan], *, most: int) -> str:
    """The same as Markdown. most: rows of the table of settings."""
    return "\n".join(
        (
            *_head(planner, plan),
            "",
            *_memory(planner.hardware, plan),
            "",
            *_time(plan),
            "",
            *_settings(planner, fitting, short, most),
        )
    )


def _head(planner: Planner, plan: Plan) -> Iterable[str]:
    hardware, batches = planner.hardware, plan.batches
    yield f"# {planner.recipe.name}, stage {planner.settings.name}, on {planner.nodes} x {hardware.devices} {hardware.name}"
    yield ""
    yield (
        f"On paper, not measured. Samples: {planner.lengths.mean_text:g} tokens of text in the mean, "
        f"{planner.lengths.images} image(s), {planner.lengths.text_only:.0%} without; tail share {planner.tail_share:g}. "
        f"Batches: {planner.recipe.data.batching}, {batches.padding:.1%} padding, the largest of the processes' "
        f"micro-batches {batches.imbalance:.2f} x the mean. What is reached of the peaks, and all else that is assumed: "
        "docs/scaling.md."
    )
    yield ""
    yield f"As it stands: `{plan.choice.overrides(planner.stage)}`"


def _memory(hardware: Hardware, plan: Plan) -> Iterable[str]:
    memory = plan.peak.memory
    yield f"Memory of each GPU at the largest micro-batch of a thousand ({plan.batches.largest.positions:,} positions):"
    yield ""
    yield from _table(
        ("kind", "MiB"), [(kind, f"{size / _MIB:,.0f}") for kind, size in memory.rows.items() if size], numbers=1
    )
    missing = plan.missing(hardware)
    verdict = "fits" if missing <= 0 else f"short of {missing / GIB:.1f} GiB"
    host = f"; {memory.host / GIB:.1f} GiB of host memory a process" if memory.host else ""
    yield ""
    yield f"**{memory.device / GIB:.1f} of {hardware.memory_bytes / GIB:.1f} GiB: {verdict}**{host}."


def _time(plan: Plan) -> Iterable[str]:
    estimate = plan.estimate
    yield f"Time of a step ({estimate.samples:,} samples, {estimate.num_micro_batches} micro-batch(es) a GPU):"
    yield ""
    total = estimate.total_seconds
    rows = [
        (kind, f"{seconds * 1000:,.1f}", f"{seconds / total:.1%}")
        for kind, seconds in estimate.seconds.items()
        if seconds > 0
    ]
    yield from _table(("kind", "ms", "share"), rows, numbers=2)
    yield ""
    yield (
        f"**{total * 1000:,.0f} ms**: {estimate.samples_per_second:,.1f} samples/s, {estimate.tokens_per_second:,.0f} "
        f"tokens/s; MFU {estimate.mfu:.1%} by FLOPs needed, {estimate.mfu_six_n:.1%} by 6N."
    )


def _settings(planner: Planner, fitting: Sequence[Plan], short: Sequence[Plan], most: int) -> Iterable[str]:
    yield f"Settings that fit, best first ({min(most, len(fitting))} of {len(fitting)}):"
    yield ""
    rows = [
        (
            f"{plan.estimate.total_seconds * 1000:,.0f}",
            f"{plan.estimate.samples_per_second:,.1f}",
            f"{plan.estimate.mfu:.1%}",
            f"{plan.peak.memory.device / GIB:.1f}",
            f"{plan.peak.memory.host / GIB:.1f}",
            f"`{plan.choice.overrides(planner.stage)}`",
        )
        for plan in fitting[:most]
    ]
    yield from _table(("ms a step", "samples/s", "MFU", "GiB", "host GiB", "overrides"), rows, numbers=5, first=0)
    if short:
        nearest = short[0]
        yield ""
        yield (
            f"{len(short)} settings do not fit. The nearest is short of {nearest.missing(planner.hardware) / GIB:.1f} GiB: "
            f"`{nearest.choice.overrides(planner.stage)}`"
        )


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int, first: int | None = None
) -> Iterable[str]:
    """Lines of a table. numbers: columns that are aligned to the right, from `first` (None: the last ones)."""
    start = len(heads) - numbers if first is None else first
    marks = ["---:" if start <= place < start + numbers else "---" for place in range(len(heads))]
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join(marks)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
