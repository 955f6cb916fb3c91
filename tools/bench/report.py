"""What a benchmark writes: hardware, JSON, Markdown."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: processor, cores in use, GPU, versions, and how busy the machine was."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "deepspeed"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the result; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def setting_line(result: dict[str, Any]) -> str:
    """One line of a result: the hardware and its software."""
    hardware = result["hardware"]
    return (
        f"{hardware['device']}, {hardware['threads']} of {hardware['cores']} cores, torch {hardware['torch']}; "
        f"load {hardware['load_average']}"
    )


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: hardware, sizes, one table."""
    hardware, config = result["hardware"], result["config"]
    peaks = ", ".join(f"{dtype} {peak['tflops']:.4g} ({peak['source']})" for dtype, peak in config["peaks"].items())
    lines = [
        f"**{hardware['device']}**, {hardware['threads']} of {hardware['cores']} cores, torch {hardware['torch']}, "
        f"transformers {hardware['transformers']}, deepspeed {hardware['deepspeed']}; load {hardware['load_average']}",
        "",
        f"{config['tokens']} tokens, D {config['model_width']}, F {config['ffn_width']}, {config['experts']} experts, "
        f"top-{config['top_k']}, tail share {config['tail_share']}, {config['rounds']} rounds; busiest expert "
        f"{config['load_imbalance']:.2f} x the mean. Forward + backward; ratio to the dense floor: median "
        "(spread, p90 - p10 over the median). Dropped: (token, expert) assignments. MFU of the FLOPs needed / by 6N; "
        f"peak TFLOP/s: {peaks}.",
        "",
        "| variant | type | ratio | ms | TFLOP/s | MFU | saved MiB (x floor) | peak MiB | syncs | kernels | allocations "
        "| dropped |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["variants"].values():
        counted = (_or_nothing(row[name]) for name in ("peak_mib", "host_syncs", "kernels", "allocations", "dropped"))
        lines.append(
            f"| {row['label']} | {row['dtype']} | {row['ratio_to_dense']:.2f} ({row['spread']:.2f}) | "
            f"{row['milliseconds']:.1f} | {row['tflops']:.3g} | {row['mfu_needed']:.1%} / {row['mfu_six_n']:.1%} | "
            f"{row['saved_mib']:.1f} ({row['saved_over_floor']:.2f}) | {' | '.join(counted)} |"
        )
    lines += [f"| {name} | not run: {reason} |{' |' * 10}" for name, reason in result["unavailable"].items()]
    return "\n".join(lines) + "\n"


def _or_nothing(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
