"""Where the time of a pass goes: a trace for a viewer, and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.measure import Given

TRACED_PASSES = 3
_LONGEST_NAME = 90


def trace_pass(layer: nn.Module, problem: Given, path: Path, *, title: str) -> None:
    """Profile passes of a layer that has run before; write `path` (Chrome's JSON, for chrome://tracing or Perfetto)
    and a table beside it, of the same name with .md."""
    device = problem.x_BSD.device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(TRACED_PASSES):
            layer(problem.x_BSD.detach().requires_grad_()).backward(problem.grad_BSD)
            layer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))
    path.with_suffix(".md").write_text(time_table(profiler, device, num_passes=TRACED_PASSES, title=title))


def time_table(profiler: Any, device: torch.device, *, num_passes: int, title: str, limit: int = 20) -> str:
    """Markdown: kernels of the device (on a CPU operators) by the time that they themselves took, the longest first.

    profiler: a torch.profiler.profile that has ended. num_passes: how often it saw the same work. limit: rows; the rest
    is summed up.
    """
    is_cuda = device.type == "cuda"
    rows = [
        (event.key, _self_time(event, is_cuda) / num_passes / 1e3, event.count / num_passes)
        for event in profiler.key_averages()
        if not is_cuda or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    total = sum(milliseconds for _, milliseconds, _ in rows)
    what = "kernel" if is_cuda else "operator"
    lines = [
        f"**{title}**: {total:.3f} ms in {what}s a pass, by their own time; mean of {num_passes} passes.",
        "",
        f"| {what} | ms | share | calls |",
        "|---|---|---|---|",
    ]
    for name, milliseconds, calls in rows[:limit]:
        lines.append(f"| `{_short(name)}` | {milliseconds:.3f} | {milliseconds / total:.1%} | {calls:g} |")
    if rest := rows[limit:]:
        milliseconds = sum(row[1] for row in rest)
        lines.append(
            f"| {len(rest)} others | {milliseconds:.3f} | {milliseconds / total:.1%} | {sum(row[2] for row in rest):g} |"
        )
    return "\n".join(lines) + "\n"


def _self_time(event: Any, is_cuda: bool) -> float:
    """Microseconds."""
    return event.self_device_time_total if is_cuda else event.self_cpu_time_total


def _short(name: str) -> str:
    """A name that fits a table: C++ kernels carry whole signatures."""
    name = name.replace("|", "/").replace("`", "'")
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
