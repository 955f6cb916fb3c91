"""Where the time of a step goes, part by part: operators of the forward pass by the module or file that ran them, those
of the backward pass by the operator of the forward pass that they belong to. No module is changed for it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.tracing import time_table

FORWARD, BACKWARD, RECOMPUTE, REST = PHASES = ("forward", "backward", "recompute", "rest")
OTHER = "other"

# Looked for in all that encloses an operator: what is inside the tower is the tower's, whatever its name.
_WHOLE = (
    (re.compile(r"^nn\.Module: (\w*Vision\w*|Dinov2\w*)_\d+$"), "tower"),
    (re.compile(r"^nn\.Module: \w*(Projector|QFormer|Connector)\w*_\d+$"), "connector"),
)
# The nearest that fits counts.
_NEAREST = (
    (re.compile(r"routing/losses\.py\("), "router"),
    (re.compile(r"(language_loss|loss_utils)\.py\("), "head and loss"),
    (re.compile(r"moe/(dispatch|exchange|rows)\.py\("), "dispatch and combine"),
    (re.compile(r"moe/(experts|grouped|fused|kernels|products|conflict)\.py\("), "experts"),
    (re.compile(r"^nn\.Module: \w*(Router|Gate)_\d+$"), "router"),
    (re.compile(r"^nn\.Module: \w*Experts_\d+$"), "experts"),
    (re.compile(r"^nn\.Module: (\w*MoELayer|\w*FFN)_\d+$"), "dispatch and combine"),
    (re.compile(r"^nn\.Module: \w*(Attention|RotaryEmbedding)_\d+$"), "attention"),
    (re.compile(r"^nn\.Module: \w*MLP_\d+$"), "dense FFN"),
    (re.compile(r"^nn\.Module: \w*(Norm|DecoderLayer)_\d+$"), "norms and residuals"),
    (re.compile(r"^nn\.Module: (\w*Embedding|\w*Model)_\d+$"), "embeddings and masks"),
    (re.compile(r"^nn\.Module: \w*(ForConditionalGeneration|ForCausalLM)_\d+$"), "head and loss"),
    (re.compile(r"\): to_device$"), "batch to device"),
    (re.compile(r"^Optimizer\.step#|(engine|stage3|stage_1_and_2|bf16_optimizer)\.py\(\d+\): step$"), "optimizer"),
    (re.compile(r"AccumulateGrad$"), "gradients"),
)
_BACKWARD_NODE = "autograd::engine::evaluate_function: "
_PYTHON = re.compile(r"^(nn\.Module: |<built-in |.*\.py\(\d+\): )")


def profile_step(step: Callable[[], object], device: torch.device, path: Path, *, title: str) -> None:
    """Profile one step that has run before; write `path` (Chrome's JSON, for chrome://tracing or Perfetto) and a table
    beside it, of the same name with .md: by part of the model, and on a GPU by kernel too."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities, with_stack=True, acc_events=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))
    is_cuda = device.type == "cuda"
    page = part_table(time_by_part(profiler.events(), is_cuda=is_cuda), title=title, is_cuda=is_cuda)
    if is_cuda:
        page += "\n" + time_table(profiler, device, num_passes=1, title=title)
    path.with_suffix(".md").write_text(page)


def time_by_part(events: Iterable[Any], *, is_cuda: bool) -> dict[str, dict[str, float]]:
    """{part: {phase: milliseconds}} of operators by the time that they took themselves: on the device, or on a CPU on it.

    events: of torch.profiler with stacks.
    """
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    forward = _forward_parts(on_host)
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
    attributed = 0.0
    for event in on_host:
        microseconds = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if microseconds <= 0 or (not is_cuda and _PYTHON.match(event.name)):
            continue
        part, phase = _place(event, forward)
        found[part][phase] += microseconds / 1e3
        attributed += microseconds
    if is_cuda:
        total = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
        found[OTHER][REST] += max(total - attributed, 0.0) / 1e3  # launched by no operator
    return dict(found)


def part_table(parts: dict[str, dict[str, float]], *, title: str, is_cuda: bool) -> str:
    """Markdown: the parts, the longest first, in milliseconds."""
    total = sum(sum(phases.values()) for phases in parts.values())
    what = "kernels" if is_cuda else "operators (the interpreter's time is not among it)"
    lines = [
        f"**{title}**: {total:.1f} ms in {what} of one step.",
        "",
        f"| part | {' | '.join(f'{phase} ms' for phase in PHASES)} | ms | share |",
        "|---|" + "---|" * (len(PHASES) + 2),
    ]
    for part, phases in sorted(parts.items(), key=lambda item: -sum(item[1].values())):
        milliseconds = sum(phases.values())
        numbers = " | ".join(f"{phases[phase]:.2f}" for phase in PHASES)
        lines.append(f"| {part} | {numbers} | {milliseconds:.2f} | {milliseconds / total:.1%} |")
    return "\n".join(lines) + "\n"


def _forward_parts(events: Iterable[Any]) -> dict[tuple[int, int], str]:
    """(thread, sequence number) of an autograd node -> the part whose operator made it. An operator carries the number
    of the node that comes next, so of several with one number the last is its maker."""
    makers: dict[tuple[int, int], Any] = {}
    for event in events:
        if event.sequence_nr < 0 or event.name.startswith(_BACKWARD_NODE) or event.fwd_thread:
            continue
        key = (event.thread, event.sequence_nr)
        if key not in makers or event.time_range.start >= makers[key].time_range.start:
            makers[key] = event
    return {key: _part(_enclosing(event)) for key, event in makers.items()}


def _place(event: Any, forward: dict[tuple[int, int], str]) -> tuple[str, str]:
    """(part, phase) of an operator."""
    inside: list[Any] = []
    for one in _enclosing(event):
        if one.name.startswith(_BACKWARD_NODE):
            if any(inner.name.startswith("nn.Module: ") for inner in inside):
                return _part(inside), RECOMPUTE
            if one.sequence_nr < 0:
                return _part([one]), BACKWARD
            return forward.get((one.fwd_thread, one.sequence_nr), OTHER), BACKWARD
        inside.append(one)
    part = _part(inside)
    return part, REST if part in ("optimizer", "batch to device", OTHER) else FORWARD


def _enclosing(event: Any) -> Iterator[Any]:
    """The event and all around it, the nearest first."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _part(enclosing: Iterable[Any]) -> str:
    names = [event.name for event in enclosing]
    for pattern, part in _WHOLE:
        if any(pattern.search(name) for name in names):
            return part
    for name in names:
        for pattern, part in _NEAREST:
            if pattern.search(name):
                return part
    return OTHER
