"""Time one optimizer step of a recipe's stage, forward, backward and AdamW, against the dense model and other stacks.

The trainer's own code runs the step, on the samples of the stage's first step. Everything runs in one process, or in
torchrun's, interleaved: each round runs each variant once on the same samples, and a ratio is taken within a round.
Variants that need an engine of their own (other stacks) get rounds of their own beside the dense floor, so that never
more than two models are in memory. The learning rate is 0: each step is the same work. All models start as copies of one
dense model, so all losses must agree before anything is timed, and gradients too where variants compute the same
(--no-check leaves that out). A variant that cannot run here is listed with the reason. Ctrl-C ends with what was measured.

Examples:
    python tools/bench_step.py --json step.json --markdown step.md --estimate
    python tools/bench_step.py --model ltdr/ltdr_stablelm scale=tiny --variants ours,packed,full_logits
    python tools/bench_step.py --size stablelm --device cuda --repeats 3 --peak-tflops 989 --png step.png
    torchrun --nproc_per_node 2 tools/bench_step.py --size tiny

--model RECIPE takes its last stage, or --stage, with its data (default: quickstart); on one process experts are not spread.
--size SIZE needs no data: StableLM-1.6B's sizes, or tiny ones, with random weights, images, and texts of LLaVA's lengths.

JSON: {"hardware": {...}, "config": {...}, "variants": {name: {"ratio_to_dense", "spread", "milliseconds",
"tokens_per_second", "samples_per_second", "mfu_six_n", "mfu_needed", "saved_mib", "peak_mib", "dropped", "padding",
...}}, "unavailable": {name: reason}}. Tokens are those without padding. MFU is the share of the peak that the FLOPs needed
come to (input gradients and weight gradients that training needs, no padding, nothing twice), and by 6N, 6 x activated
parameters x tokens. Saved MiB are what autograd keeps of a micro-batch for the backward pass, parameters left out;
dropped are (token, expert) assignments.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from bench.chart import bar_chart
from bench.command import add_figure_options, add_measuring_options, give, parse_measuring, prepare_device
from bench.report import setting_line
from rich.console import Console

SIZES = Path(__file__).resolve().parent / "bench" / "sizes"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="RECIPE", help="a recipe's name or file (default: quickstart)")
    what.add_argument("--size", choices=sorted(path.stem for path in SIZES.glob("*.yaml")), help="random, no data")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe's own values")
    parser.add_argument("--stage", metavar="NAME", help="of the recipe (default: its last)")
    parser.add_argument("--samples", type=int, help="of a micro-batch and a process, one micro-batch a step")
    parser.add_argument("--estimate", action="store_true", help="beside what tools/estimate.py says of this machine")
    add_measuring_options(parser, floor="the dense floor")
    add_figure_options(parser)
    args = parse_measuring(parser, argv)
    if args.samples is not None and args.samples < 1:
        parser.error("--samples: 1 and above")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    if int(os.environ.get("RANK", "0")):  # measures with the others; the first tells
        args.json = args.markdown = args.png = None
        run(args, Console(quiet=True))
        return 0
    return give(args, run, markdown, bar_chart)


def run(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], bool]:
    """Measure all variants; the result, and whether Ctrl-C cut it short.

    Raises:
        KeyboardInterrupt: it came before any round was complete.
        ValueError: a recipe, device or variants that cannot be; CheckError if a variant computes something else.
    """
    prepare_device(args)
    # deepspeed comes with it, and reads what `prepare_device` has set
    from bench.step_bench import measure_steps

    recipe = SIZES / f"{args.size}.yaml" if args.size else args.model or "quickstart"
    return measure_steps(args, recipe, console)


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: hardware, the stage, one table."""
    config = result["config"]
    lines = [
        f"**{setting_line(result)}**, transformers {result['hardware']['transformers']}, deepspeed "
        f"{result['hardware']['deepspeed']}",
        "",
        f"Stage {config['stage']} of {config['recipe']}, {config['precision']}, {config['deepspeed']}, "
        f"{config['world_size']} process(es), {config['samples']} samples, {config['tokens']} tokens, {config['images']} "
        f"images a step, {config['rounds']} rounds; peak {config['peak']['tflops']:.3g} TFLOP/s "
        f"({config['peak']['source']}). Ratio to the dense model: median (spread, p90 - p10 over the median).",
        "",
        "| variant | ratio | ms | tokens/s | samples/s | MFU needed | MFU 6N | saved MiB | peak MiB | padding | dropped |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["variants"].values():
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        lines.append(
            f"| {row['label']} | {row['ratio_to_dense']:.2f} ({row['spread']:.2f}) | {row['milliseconds']:,.1f} | "
            f"{row['tokens_per_second']:,.0f} | {row['samples_per_second']:,.1f} | {row['mfu_needed']:.1%} | "
            f"{row['mfu_six_n']:.1%} | {row['saved_mib']:,.1f} | {peak} | {row['padding']:.1%} | {row['dropped']} |"
        )
    lines += [f"| {name} | not run: {reason} | | | | | | | | | |" for name, reason in result["unavailable"].items()]
    return "\n".join([*lines, *_estimates(result["variants"])]) + "\n"


def _estimates(variants: dict[str, Any]) -> list[str]:
    """A table of what was estimated, if anything was; errors are shares of what was measured."""
    rows = [row for row in variants.values() if "estimated_milliseconds" in row]
    if not rows:
        return []
    lines = ["", "| variant | estimated ms | error | estimated saved MiB | error |", "|---|---|---|---|---|"]
    for row in rows:
        milliseconds, saved = row["estimated_milliseconds"], row["estimated_saved_mib"]
        lines.append(
            f"| {row['label']} | {milliseconds:,.1f} | {milliseconds / row['milliseconds'] - 1:+.1%} | {saved:,.1f} | "
            f"{saved / row['saved_mib'] - 1:+.1%} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
