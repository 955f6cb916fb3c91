"""Time the MoE layer, forward and backward, against a dense FFN of equal activated FLOPs and against other libraries.

Everything runs in one process, interleaved: each round runs every variant once, and a ratio is taken within a round.
Before anything is timed each variant is compared with a plain computation of the same function (--no-check leaves
that out). A variant that cannot run here is listed with the reason. Ctrl-C ends with what was measured so far.

Example:
    python tools/bench_layer.py --dtype both --repeats 9 --json layer.json --markdown layer.md
    python tools/bench_layer.py --tokens 1024 --variants ours,transformers_eager --png layer.png --profile traces

JSON: {"hardware": {...}, "config": {...}, "variants": {name: {"ratio_to_dense", "spread", "saved_mib", "dropped",
...}}, "unavailable": {name: reason}}. With --dtype both, names stand for fp32 and names with "_bf16" added for bf16.
Saved MiB are what autograd keeps for the backward pass, parameters left out; dropped are (token, expert) assignments.
MFU is the share of the peak that the FLOPs needed come to (those of the rows that were routed and not dropped, and of
the router), and by 6N: 6 x activated parameters x tokens. Syncs (the host waits for the device) and kernels are counted
on a GPU, allocations everywhere, each of one forward and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from bench.chart import bar_chart
from bench.check import CHECK_TOKENS, check_variants
from bench.command import (
    add_figure_options,
    add_measuring_options,
    clock_of,
    give,
    parse_measuring,
    prepare_device,
)
from bench.counts import count_pass
from bench.flops import Peak, needed_flops, peak_of, routed_rows, six_n_flops
from bench.layers import BenchLayer
from bench.measure import drop_too_large, peak_mib, ratio_and_spread, saved_mib, time_interleaved
from bench.problem import DTYPES, Problem, Sizes, draw_problem, routing_probabilities
from bench.report import describe_hardware, markdown
from bench.tracing import trace_pass
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
    add_figure_options(parser)
    args = parse_measuring(parser, argv)
    if args.peak_tflops is not None and args.dtype == "both":
        parser.error("--peak-tflops: a peak is one type's; allowed: with --dtype fp32 or bf16")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return give(parse_args(argv), run, markdown, bar_chart)


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
    problem = draw_problem(sizes, dtype=DTYPES[dtype], device=device, seed=args.seed)
    # without the comparison the run still tells which variants cannot run
    unavailable = check_variants(variants, problem.first_tokens(CHECK_TOKENS), is_compared=args.check)
    for name, reason in unavailable.items():
        console.print(f"{name} ({dtype}) cannot run: {reason}", markup=False)
        result["unavailable"][name + suffix] = reason
    layers = {variant.name: variant.build(problem).train() for variant in variants if variant.name not in unavailable}
    ours = {variant.name for variant in variants if variant.is_ours}
    for name, reason in drop_too_large(layers, problem, kept={DENSE} | ours).items():
        console.print(f"{name} ({dtype}) cannot run: {reason}", markup=False)
        result["unavailable"][name + suffix] = reason
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(dtype, total=(args.repeats + args.warmup) * len(layers))
        timings = time_interleaved(
            layers,
            problem,
            repeats=args.repeats,
            warmup=args.warmup,
            seed=args.seed,
            clock=clock_of(args),
            advance=lambda name: progress.update(task, advance=1, description=f"{dtype} {name}"),
        )
    if not timings.num_rounds:
        return True
    config = result["config"]
    config["rounds"] = min(timings.num_rounds, config.get("rounds", timings.num_rounds))
    config["load_imbalance"] = load_imbalance(problem)
    peak = peak_of(device, DTYPES[dtype], args.peak_tflops, clock_of(args))
    config["peaks"] = config.get("peaks", {}) | {dtype: {"tflops": peak.flops / 1e12, "source": peak.source}}
    for variant in variants:
        if (layer := layers.get(variant.name)) is None:
            continue
        row = _measured(variant, layer, problem, timings.seconds[variant.name], timings.seconds[DENSE], peak)
        result["variants"][variant.name + suffix] = {"label": variant.label, "dtype": dtype} | row
        if args.profile is not None:
            path = args.profile / f"{variant.name}{suffix}.json"
            trace_pass(layer, problem, path, title=f"{variant.label}, {dtype}")
    if args.profile is not None:
        console.print(f"wrote traces and tables of {dtype} to {args.profile}", markup=False)
    return timings.is_interrupted


def _measured(
    variant: Variant, layer: BenchLayer, problem: Problem, seconds: list[float], floor: list[float], peak: Peak
) -> dict[str, Any]:
    """A variant's row: its times and what is counted of a pass."""
    sizes = problem.sizes
    ratio, spread = ratio_and_spread(seconds, floor)
    median = statistics.median(seconds)
    dropped = layer.count_dropped(problem.x_BSD)
    has_router = variant.computes != "dense"
    needed = needed_flops(sizes, routed_rows(problem, variant.computes) - dropped, has_router=has_router)
    saved, saved_floor = saved_mib(layer, problem), sizes.saved_floor_mib(problem.x_BSD.dtype)
    counts = count_pass(layer, problem)
    return {
        "ratio_to_dense": ratio,
        "spread": spread,
        "saved_mib": saved,
        "saved_floor_mib": saved_floor,
        "saved_over_floor": saved / saved_floor,
        "dropped": dropped,
        "milliseconds": 1e3 * median,
        "tflops": needed / median / 1e12,
        "mfu_needed": needed / median / peak.flops,
        "mfu_six_n": six_n_flops(sizes, has_router=has_router) / median / peak.flops,
        "peak_mib": peak_mib(layer, problem),
        "host_syncs": counts.host_syncs,
        "kernels": counts.kernels,
        "allocations": counts.allocations,
    }


def load_imbalance(problem: Problem) -> float:
    """Rows of the busiest expert over the mean, under plain top-k."""
    best_TK = routing_probabilities(problem.x_BSD[0], problem.gate_ED).topk(problem.sizes.top_k, dim=-1).indices
    counts_E = torch.bincount(best_TK.flatten(), minlength=problem.sizes.experts)
    return float(counts_E.max() / counts_E.float().mean())


if __name__ == "__main__":
    sys.exit(main())
