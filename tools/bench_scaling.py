"""Time how the MoE layer scales: over experts, tokens, LTDR's tail share, skewed load, and expert-parallel processes.

All sweeps run in one process, interleaved: each round runs every point of every sweep once, and a dense FFN of as many
FLOPs beside it; a ratio to the sweep's first point is taken within a round. Before anything is timed each point is
compared with a plain computation (--no-check leaves that out). The sweep over ranks starts processes of its own (gloo
on a CPU, NCCL on GPUs). Ctrl-C ends with what was measured so far.

Example:
    python tools/bench_scaling.py --json scaling.json --markdown scaling.md --png scaling.png
    python tools/bench_scaling.py --sweeps tail,ranks --points tail=0,0.13,0.5 --points ranks=1,2 --tokens 1024

JSON: {"hardware": {...}, "config": {...}, "sweeps": {name: [{"value", "ratio", "spread", "ratio_to_dense",
"floor_ratio", "goal", "milliseconds", ...}]}, "unavailable": {name: reason}}. ratio: time of a pass (over experts and
tokens: of a routed row) over that of the first point. floor_ratio: the same of the dense FFN. Sent MiB are what rank 0
sends to other processes in a forward and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from typing import Any

from bench.chart import sweep_chart
from bench.command import add_measuring_options, add_png_option, clock_of, give, parse_measuring, prepare_device
from bench.measure import Timings, interleave, ratio_and_spread, run_once
from bench.problem import DTYPES, Sizes
from bench.ranks import RanksJob, measure_ranks
from bench.report import describe_hardware, setting_line
from bench.rivals import UnavailableError
from bench.sweeps import BUILDERS, KINDS, Point, Setting, check_points, whole_number
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

RANKS = "ranks"
Values = dict[str, tuple[float, ...]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", default=",".join(KINDS), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--points", action="append", default=[], metavar="SWEEP=V,V", help="other values of a sweep; the first counts 1"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model-width", type=int, default=512)
    parser.add_argument("--ffn-width", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=4, help="of all sweeps but the one over experts")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtype", choices=[*DTYPES], default="fp32")
    add_measuring_options(parser, floor=None)
    add_png_option(parser)
    return parse_measuring(parser, argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    return give(parse_args(argv), run, markdown, sweep_chart)


def run(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """Measure all sweeps asked for; the result, and whether Ctrl-C cut it short.

    Raises:
        KeyboardInterrupt: it came before any round was complete.
        ValueError: sizes, device or values that cannot be; CheckError if a point computes something else.
    """
    device = prepare_device(args)
    values = parse_values(args)
    sizes = Sizes(
        tokens=args.tokens,
        model_width=args.model_width,
        ffn_width=args.ffn_width,
        experts=args.experts,
        top_k=args.top_k,
        tail_share=0.0,
    )
    names = ("tokens", "model_width", "ffn_width", "experts", "top_k", "dtype", "device", "clock")
    result: dict[str, Any] = {
        "hardware": describe_hardware(device),
        "config": {
            **{name: getattr(args, name) for name in (*names, "repeats", "warmup", "seed")},
            "is_checked": args.check,
        },
        "sweeps": {},
        "unavailable": {},
    }
    setting = Setting(sizes=sizes, dtype=DTYPES[args.dtype], device=device, seed=args.seed)
    is_interrupted = False
    try:
        if local := {name: points for name, points in values.items() if name != RANKS}:
            is_interrupted = _run_local(args, setting, local, result, console)
        if RANKS in values and not is_interrupted:
            _run_ranks(args, sizes, values[RANKS], result, console)
    except KeyboardInterrupt:  # outside the rounds: what other sweeps measured still counts
        is_interrupted = True
    if is_interrupted and not result["sweeps"]:
        raise KeyboardInterrupt
    return result, is_interrupted


def parse_values(args: argparse.Namespace) -> Values:
    """The values of each sweep that is to run.

    Raises:
        ValueError: an unknown sweep, or values that are no numbers.
    """
    wanted = [name.strip() for name in args.sweeps.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in KINDS]:
        raise ValueError(f"--sweeps: {', '.join(unknown)}; allowed: {', '.join(KINDS)}")
    values: Values = {name: KINDS[name].values for name in KINDS if name in wanted}
    for given in args.points:
        name, _, text = given.partition("=")
        if name not in KINDS:
            raise ValueError(f"--points: {given!r}; allowed: SWEEP=V,V with a sweep of {', '.join(KINDS)}")
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"--points: {given!r}; allowed: numbers, comma-separated, after {name}=") from None
        if name in values:
            values[name] = numbers
    return values


def _run_local(
    args: argparse.Namespace, setting: Setting, values: Values, result: dict[str, Any], console: Console
) -> bool:
    """Measure the sweeps that need one process and add them to the result; whether Ctrl-C ended them."""
    if args.check:
        for name, numbers in values.items():
            check_points(setting, name, numbers)
    sweeps = {name: BUILDERS[name](setting, numbers) for name, numbers in values.items()}
    clock = clock_of(args)
    runs = {}
    for point in (point for points in sweeps.values() for point in points):
        runs[point.name] = partial(run_once, point.layer(), point.problem, clock)
        # points of the same products share their floor
        if point.floor_name not in runs:
            runs[point.floor_name] = partial(run_once, point.floor(), point.problem, clock)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("sweeps", total=(args.repeats + args.warmup) * len(runs))
        timings = interleave(
            runs,
            repeats=args.repeats,
            warmup=args.warmup,
            seed=args.seed,
            advance=lambda name: progress.update(task, advance=1, description=name),
        )
    if timings.num_rounds:
        result["config"]["rounds"] = timings.num_rounds
        for name, points in sweeps.items():
            result["sweeps"][name] = [_measured(point, points[0], timings, setting.sizes) for point in points]
    return timings.is_interrupted


def _measured(point: Point, first: Point, timings: Timings, sizes: Sizes) -> dict[str, Any]:
    """One point against the first of its sweep."""
    kind = KINDS[point.sweep]
    # a round's ratio of times, then of the rows that they were for
    scale = first.rows / point.rows if kind.is_by_row else 1.0
    ours, floor = timings.seconds[point.name], timings.seconds[point.floor_name]
    ratio, spread = ratio_and_spread(ours, timings.seconds[first.name])
    return {
        "value": point.value,
        "ratio": ratio * scale,
        "spread": spread,
        "ratio_to_dense": ratio_and_spread(ours, floor)[0],
        "floor_ratio": ratio_and_spread(floor, timings.seconds[first.floor_name])[0] * scale,
        "goal": kind.goal(point.value, sizes),
        "milliseconds": 1e3 * statistics.median(ours),
        "rows": point.rows,
        "busiest_share": point.busiest_share,
    }


def _run_ranks(
    args: argparse.Namespace, sizes: Sizes, values: tuple[float, ...], result: dict[str, Any], console: Console
) -> None:
    """Measure expert parallelism and add it to the result."""
    job = RanksJob(
        sizes=sizes,
        ranks=tuple(whole_number(RANKS, value) for value in values),
        dtype=args.dtype,
        device=args.device,
        clock=args.clock,
        threads=args.threads,
        repeats=args.repeats,
        warmup=args.warmup,
        seed=args.seed,
    )
    console.print(f"{RANKS}: {max(job.ranks)} processes", markup=False)
    try:
        result["sweeps"][RANKS] = measure_ranks(job)
    except UnavailableError as error:
        console.print(f"{RANKS} cannot run: {error}", markup=False)
        result["unavailable"][RANKS] = str(error)


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: hardware, sizes, a table a sweep."""
    config = result["config"]
    lines = [
        f"**{setting_line(result)}**",
        "",
        f"{config['tokens']} tokens, D {config['model_width']}, F {config['ffn_width']}, {config['experts']} experts, "
        f"top-{config['top_k']}, {config['dtype']}, {config['repeats']} rounds, {config['clock']} clock. Forward + "
        "backward; ratio to the sweep's first point: median (spread, p90 - p10 over the median). Floor: the same of a "
        "dense FFN of as many FLOPs.",
    ]
    for name, points in result["sweeps"].items():
        kind = KINDS[name]
        lines += ["", f"{kind.title}: {kind.measure} by {kind.axis}."]
        if name == RANKS:
            lines += ["", *_ranks_table(points, result)]
            continue
        lines += [
            "",
            "| value | ratio | goal (at most) | floor | x dense | ms | busiest expert's share of tokens |",
            "|---|---|---|---|---|---|---|",
        ]
        for point in points:
            goal = "" if point["goal"] is None else f"{point['goal']:.2f}"
            lines.append(
                f"| {point['value']:g} | {point['ratio']:.2f} ({point['spread']:.2f}) | {goal} | "
                f"{point['floor_ratio']:.2f} | {point['ratio_to_dense']:.2f} | {point['milliseconds']:.1f} | "
                f"{point['busiest_share']:.2f} |"
            )
    lines += [f"\n{name}: not run, {reason}" for name, reason in result["unavailable"].items()]
    return "\n".join(lines) + "\n"


def _ranks_table(points: list[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    hardware = result["hardware"]
    lines = []
    if result["config"]["device"] == "cpu" and max(point["value"] for point in points) > hardware["cores"]:
        lines += [
            f"More processes than the {hardware['cores']} cores: times are indicative only, and the floor, which "
            "exchanges nothing, slows down as well. What is counted does not depend on it.",
            "",
        ]
    lines += [
        "| processes | ratio | floor | x dense | ms | exchanges | sent MiB | other collectives | syncs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        syncs = "" if point["host_syncs"] is None else point["host_syncs"]
        lines.append(
            f"| {point['value']} | {point['ratio']:.2f} ({point['spread']:.2f}) | {point['floor_ratio']:.2f} | "
            f"{point['ratio_to_dense']:.2f} | {point['milliseconds']:.1f} | {point['exchanges']} | "
            f"{point['sent_mib']:.2f} | {len(point['other_collectives'])} | {syncs} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
