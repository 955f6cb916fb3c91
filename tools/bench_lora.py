"""Time a frozen linear with LoRA experts (MoCLE), forward and backward, against the linear alone and other ways.

Everything runs in one process, interleaved: each round runs every variant once, and a ratio is taken within a round.
Before anything is timed each variant is compared with a plain computation (--no-check leaves that out). A variant that
cannot run here is listed with the reason. Ctrl-C ends with what was measured so far.

Example:
    python tools/bench_lora.py --linears 1024x1024,1024x4096,4096x1024 --json lora.json --markdown lora.md
    python tools/bench_lora.py --batch 4 --rank 128 --variants mocle,peft --dtype bf16

JSON: {"hardware": {...}, "config": {...}, "linears": {"1024x4096": {name: {"label", "ratio_to_base", "spread",
"milliseconds", "saved_mib", "peak_mib"}}}, "unavailable": {name: reason}}. A linear is inputs x outputs. Saved MiB are
what autograd keeps for the backward pass, parameters left out. Gates are without noise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from bench.command import add_measuring_options, give, parse_measuring, prepare_device
from bench.lora import LoRASizes, check_lora, choose_lora, draw_lora_problem
from bench.measure import peak_mib, ratio_and_spread, saved_mib, time_interleaved
from bench.problem import DTYPES
from bench.report import describe_hardware
from bench.variants import DENSE
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--linears",
        default="1024x1024,1024x4096,4096x1024",
        help="inputs x outputs, comma-separated (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=16, help="samples")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--experts", type=int, default=4, help="without the universal one")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=[*DTYPES], default="fp32")
    add_measuring_options(parser, floor="the linear alone")
    return parse_measuring(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return give(parse_args(argv), run, markdown)


def run(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """Measure all linears asked for; the result, and whether Ctrl-C cut it short.

    Raises:
        KeyboardInterrupt: it came before any round was complete.
        ValueError: sizes, device or variants that cannot be; CheckError if a variant computes something else.
    """
    device = prepare_device(args)
    names = ("batch", "sequence", "experts", "rank", "dtype", "device", "clock", "repeats", "warmup", "seed")
    result: dict[str, Any] = {
        "hardware": describe_hardware(device),
        "config": {**{name: getattr(args, name) for name in names}, "is_checked": args.check},
        "linears": {},
        "unavailable": {},
    }
    for sizes in parse_linears(args):
        try:
            is_interrupted = _run_linear(args, sizes, device, result, console)
        except KeyboardInterrupt:  # outside the rounds: what another linear measured still counts
            is_interrupted = True
        if is_interrupted:
            if not result["linears"]:
                raise KeyboardInterrupt
            return result, True
    return result, False


def parse_linears(args: argparse.Namespace) -> list[LoRASizes]:
    """The sizes that `--linears` names.

    Raises:
        ValueError: something else than inputs x outputs.
    """
    found = []
    for part in args.linears.split(","):
        inputs, _, outputs = part.strip().partition("x")
        if not (inputs.isdecimal() and outputs.isdecimal()):
            raise ValueError(f"--linears: {part.strip()!r}; allowed: inputs x outputs, as 1024x4096, comma-separated")
        found.append(
            LoRASizes(
                batch=args.batch,
                sequence=args.sequence,
                inputs=int(inputs),
                outputs=int(outputs),
                experts=args.experts,
                rank=args.rank,
            )
        )
    return found


def _run_linear(
    args: argparse.Namespace, sizes: LoRASizes, device: torch.device, result: dict[str, Any], console: Console
) -> bool:
    """Measure one linear and add its rows to the result; whether Ctrl-C ended it."""
    name = f"{sizes.inputs}x{sizes.outputs}"
    variants = choose_lora(args.variants, sizes)
    problem = draw_lora_problem(sizes, dtype=DTYPES[args.dtype], device=device, seed=args.seed)
    unavailable = check_lora(variants, problem, is_compared=args.check)
    for missing, reason in unavailable.items():
        if missing not in result["unavailable"]:
            console.print(f"{missing} cannot run: {reason}", markup=False)
    result["unavailable"] |= unavailable
    able = [variant for variant in variants if variant.name not in unavailable]
    layers = {variant.name: variant.build(problem).train() for variant in able}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(name, total=(args.repeats + args.warmup) * len(layers))
        timings = time_interleaved(
            layers,
            problem,
            repeats=args.repeats,
            warmup=args.warmup,
            seed=args.seed,
            clock=time.process_time if args.clock == "cpu" else time.perf_counter,
            advance=lambda variant: progress.update(task, advance=1, description=f"{name} {variant}"),
        )
    if not timings.num_rounds:
        return True
    result["config"]["rounds"] = min(timings.num_rounds, result["config"].get("rounds", timings.num_rounds))
    rows = result["linears"][name] = {}
    for one in able:
        ratio, spread = ratio_and_spread(timings.seconds[one.name], timings.seconds[DENSE])
        rows[one.name] = {
            "label": one.label,
            "ratio_to_base": ratio,
            "spread": spread,
            "milliseconds": 1e3 * statistics.median(timings.seconds[one.name]),
            "saved_mib": saved_mib(layers[one.name], problem),
            "peak_mib": peak_mib(layers[one.name], problem),
        }
    return timings.is_interrupted


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: hardware, sizes, one table a linear."""
    hardware, config = result["hardware"], result["config"]
    lines = [
        f"**{hardware['device']}**, {hardware['threads']} of {hardware['cores']} cores, torch {hardware['torch']}; load "
        f"{hardware['load_average']}",
        "",
        f"{config['batch']} samples of {config['sequence']} tokens, {config['experts']} experts, rank {config['rank']}, "
        f"{config['dtype']}, {config['rounds']} rounds. Forward + backward, the base frozen; ratio to the linear alone: "
        "median (spread, p90 - p10 over the median).",
    ]
    for name, rows in result["linears"].items():
        lines += ["", f"Linear {name}:", "", "| variant | ratio | ms | saved MiB | peak MiB |", "|---|---|---|---|---|"]
        for row in rows.values():
            peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            lines.append(
                f"| {row['label']} | {row['ratio_to_base']:.2f} ({row['spread']:.2f}) | {row['milliseconds']:.1f} | "
                f"{row['saved_mib']:.1f} | {peak} |"
            )
    lines += [f"\n{name}: not run, {reason}" for name, reason in result["unavailable"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
