"""Time the MoE layer, forward and backward, against a dense FFN of equal activated FLOPs and against other libraries.

Everything runs in one process, interleaved: each round runs every variant once, and a ratio is taken within a round.
Before anything is timed each variant is compared with a plain computation of the same function (--no-check leaves
that out). A variant that cannot run here is listed with the reason. Ctrl-C ends with what was measured so far.

Example:
    python tools/bench_layer.py --dtype both --repeats 9 --json layer.json --markdown layer.md
    python tools/bench_layer.py --tokens 1024 --variants ours,transformers_eager

JSON: {"hardware": {...}, "config": {...}, "variants": {name: {"ratio_to_dense", "spread", "saved_mib", "dropped",
...}}, "unavailable": {name: reason}}. With --dtype both, names stand for fp32 and names with "_bf16" added for bf16.
Saved MiB are what autograd keeps for the backward pass, parameters left out; dropped are (token, expert) assignments.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from bench.check import check_variants
from bench.command import add_measuring_options, give, parse_measuring, prepare_device
from bench.measure import peak_mib, ratio_and_spread, saved_mib, time_interleaved
from bench.problem import DTYPES, Problem, Sizes, draw_problem, routing_probabilities
from bench.report import describe_hardware, markdown
from bench.variants import DENSE, Variant, choose
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model-width", type=int, default=512)
    parser.add_argument("--ffn-width", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tail-share", type=float, default=0.13, help="share of tokens on all experts under LTDR")
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both")
    add_measuring_options(parser, floor="the dense floor")
    return parse_measuring(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return give(parse_args(argv), run, markdown)


def run(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """Measure all types asked for; the result, and whether Ctrl-C cut it short.

    Raises:
        KeyboardInterrupt: it came before any round was complete.
        ValueError: sizes, device or variants that cannot be; CheckError if a variant computes something else.
    """
    device = prepare_device(args)
    sizes = Sizes(
        tokens=args.tokens,
        model_width=args.model_width,
        ffn_width=args.ffn_width,
        experts=args.experts,
        top_k=args.top_k,
        tail_share=args.tail_share,
    )
    variants = choose(args.variants)
    dtypes = list(DTYPES) if args.dtype == "both" else [args.dtype]
    result: dict[str, Any] = {
        "hardware": describe_hardware(device),
        "config": {
            **{name: getattr(sizes, name) for name in sizes.__dataclass_fields__},
            "dtype": args.dtype,
            "device": args.device,
            "clock": args.clock,
            "repeats": args.repeats,
            "warmup": args.warmup,
            "seed": args.seed,
            "is_checked": args.check,
        },
        "variants": {},
        "unavailable": {},
    }
    for dtype in dtypes:
        suffix = "_bf16" if args.dtype == "both" and dtype == "bf16" else ""
        try:
            is_interrupted = _run_dtype(args, variants, sizes, dtype, suffix, result, console)
        except KeyboardInterrupt:  # outside the rounds: what another type measured still counts
            is_interrupted = True
        if is_interrupted:
            if not result["variants"]:
                raise KeyboardInterrupt
            return result, True
    return result, False


def _run_dtype(
    args: argparse.Namespace,
    variants: tuple[Variant, ...],
    sizes: Sizes,
    dtype: str,
    suffix: str,
    result: dict[str, Any],
    console: Console,
) -> bool:
    """Measure one type and add its rows to the result; whether Ctrl-C ended it."""
    device = torch.device(args.device)
    setting = {"dtype": DTYPES[dtype], "device": device, "seed": args.seed}
    # without the comparison the run still tells which variants cannot run
    unavailable = check_variants(variants, sizes, **setting, is_compared=args.check)
    for name, reason in unavailable.items():
        console.print(f"{name} ({dtype}) cannot run: {reason}", markup=False)
        result["unavailable"][name + suffix] = reason
    able = [variant for variant in variants if variant.name not in unavailable]
    problem = draw_problem(sizes, **setting)
    layers = {variant.name: variant.build(problem).train() for variant in able}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(dtype, total=(args.repeats + args.warmup) * len(layers))
        timings = time_interleaved(
            layers,
            problem,
            repeats=args.repeats,
            warmup=args.warmup,
            seed=args.seed,
            clock=time.process_time if args.clock == "cpu" else time.perf_counter,
            advance=lambda name: progress.update(task, advance=1, description=f"{dtype} {name}"),
        )
    if not timings.num_rounds:
        return True
    result["config"]["rounds"] = min(timings.num_rounds, result["config"].get("rounds", timings.num_rounds))
    result["config"]["load_imbalance"] = load_imbalance(problem)
    floor = timings.seconds[DENSE]
    for variant in able:
        ratio, spread = ratio_and_spread(timings.seconds[variant.name], floor)
        layer = layers[variant.name]
        result["variants"][variant.name + suffix] = {
            "label": variant.label,
            "dtype": dtype,
            "ratio_to_dense": ratio,
            "spread": spread,
            "saved_mib": saved_mib(layer, problem),
            "saved_floor_mib": sizes.saved_floor_mib(DTYPES[dtype]),
            "dropped": layer.count_dropped(problem.x_BSD),
            "milliseconds": 1e3 * statistics.median(timings.seconds[variant.name]),
            "peak_mib": peak_mib(layer, problem),
        }
    return timings.is_interrupted


def load_imbalance(problem: Problem) -> float:
    """Rows of the busiest expert over the mean, under plain top-k."""
    best_TK = routing_probabilities(problem.x_BSD[0], problem.gate_ED).topk(problem.sizes.top_k, dim=-1).indices
    counts_E = torch.bincount(best_TK.flatten(), minlength=problem.sizes.experts)
    return float(counts_E.max() / counts_E.float().mean())


if __name__ == "__main__":
    sys.exit(main())
