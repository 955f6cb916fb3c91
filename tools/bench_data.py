"""Time a stage's data alone: the loader with so many workers, what a sample costs part by part, and what batches waste.

Loaders are interleaved: each round runs each once on the same steps, as rank 0 of --ranks, from the moment on at which
its workers are busy. Costs are of this process alone. Padding and imbalance (the most positions of a process over the
mean) go by the lengths of samples, over --ranks processes. Ctrl-C ends with what was measured so far.

Goals: the loader gives at least 2 x what the model needs (--need, samples a second of one process) on two cores; padding
at most 2 %, imbalance at most 1.03.

Examples:
    python tools/bench_data.py --workers 0,1,2 --json data.json --markdown data.md
    python tools/bench_data.py ltdr/ltdr_stablelm data.image_root=/data --stage sparse --need 42
    python tools/bench_data.py --synthetic --need 42

RECIPE (default: quickstart) and key=value as for training; a recipe with data.feature_cache is timed with it too.
--synthetic makes its data in a temporary folder: JPEGs of 640 x 480, conversations of LLaVA's lengths, CLIP-L/336's image
processor, and features in the place of CLIP's; for stage III of LTDR at StableLM's sizes, 128 samples a step.

JSON: {"hardware": {...}, "config": {...}, "costs": {part: {"label", "milliseconds", "per"}}, "batches": {batching:
{"padding", "imbalance"}}, "loaders": {"packed_2": {"label", "workers", "samples_per_second", "images_per_second",
"tokens_per_second", "ratio_to_first", "spread", "bad", "need_factor"}}}.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.command import Result, give
from bench.measure import interleave, ratio_and_spread
from bench.report import describe_hardware, setting_line
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

if TYPE_CHECKING:
    from bench.data_loaders import Batching, LoaderRun

    from moe_lvlm.training.data import StageData

SYNTHETIC = Path(__file__).resolve().parent / "bench" / "sizes" / "stablelm.yaml"
MAX_PADDING, MAX_IMBALANCE, MIN_FACTOR = 0.02, 1.03, 2.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name or a file (default: quickstart)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe's own values")
    parser.add_argument("--synthetic", action="store_true", help="make the data; no RECIPE")
    parser.add_argument("--images", type=int, default=64, help="that --synthetic makes, and its records share")
    parser.add_argument("--records", type=int, default=2048, help="that --synthetic makes")
    parser.add_argument("--stage", metavar="NAME", help="of the recipe (default: its last)")
    parser.add_argument("--workers", default="0,1,2", help="numbers, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--batchings", help="padded, padded_grouped, packed, packed_balanced, cached (default: all but padded_grouped)"
    )
    parser.add_argument(
        "--ranks", type=int, help="processes that share a step (default: up to 8, as many as divide it)"
    )
    parser.add_argument("--need", type=float, help="samples a second that the model of one process takes")
    parser.add_argument("--micro-batches", type=int, default=8, help="that are timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="whose padding and imbalance are counted")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    numbers = (args.images, args.records, args.ranks or 1, args.micro_batches, args.steps, args.repeats, args.threads)
    if min(numbers) < 1 or args.ranks == 0 or (args.need is not None and not args.need > 0):
        parser.error(
            "--images, --records, --ranks, --micro-batches, --steps, --repeats, --threads: 1 and above; --need: above 0"
        )
    if args.recipe is not None and "=" in args.recipe:  # overrides of the default recipe
        args.overrides, args.recipe = [args.recipe, *args.overrides], None
    if args.synthetic and args.recipe is not None:
        parser.error(f"--synthetic makes its own data; leave {args.recipe} out")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    # read when transformers looks for deepspeed's accelerator
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return give(args, run, markdown)


def run(args: argparse.Namespace, console: Console) -> tuple[Result, bool]:
    """Measure; the result, and whether Ctrl-C cut it short.

    Raises:
        KeyboardInterrupt: it came before any round was complete.
        ValueError: a recipe, numbers or batchings that cannot be.
    """
    workers = parse_workers(args.workers)
    if not args.synthetic:
        return _measure(args, args.recipe or "quickstart", args.overrides, None, workers, console)
    from bench.data_synthetic import write_data

    with tempfile.TemporaryDirectory(prefix="bench_data_") as name:
        folder = Path(name)
        console.print("making data", markup=False)
        given = write_data(folder / "data", num_images=args.images, num_records=args.records, seed=args.seed)
        cache = str(folder / "data" / "features")
        return _measure(args, SYNTHETIC, [*given, *args.overrides], cache, workers, console)


def parse_workers(text: str) -> list[int]:
    """Numbers of workers.

    Raises:
        ValueError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--workers: {text!r}; allowed: whole numbers from 0, comma-separated")
    return sorted({int(part) for part in parts})


def _measure(
    args: argparse.Namespace,
    recipe_path: str | Path,
    overrides: list[str],
    cache: str | None,
    workers: list[int],
    console: Console,
) -> tuple[Result, bool]:
    import torch
    from bench.data_costs import measure_costs
    from bench.data_loaders import LoaderRun, choose_batchings, measure_waste, open_stage

    from moe_lvlm.config.load import load_recipe
    from moe_lvlm.training.build import run_processor

    torch.set_num_threads(args.threads)
    recipe = load_recipe(recipe_path, overrides)
    stage = len(recipe.stages) - 1 if args.stage is None else recipe.stage_index(args.stage)
    cache = recipe.data.feature_cache if cache is None else cache
    processor = run_processor(recipe)
    opened = {
        one: open_stage(recipe, stage, processor, one, cache)
        for one in choose_batchings(args.batchings)
        if not one.is_cached or cache is not None
    }
    if not opened:
        raise ValueError(f"--batchings: {args.batchings}, but the recipe has no data.feature_cache; allowed: with one")
    first = next(iter(opened.values()))
    count = first.order.num_micro_batches
    ranks = args.ranks or max(number for number in range(1, 9) if count % number == 0)
    first.order.check_world_size(ranks)
    result: Result = {
        "hardware": describe_hardware(torch.device("cpu")),
        "config": {
            "recipe": recipe.name,
            "stage": recipe.stages[stage].name,
            "micro_batch": recipe.stages[stage].micro_batch,
            "global_batch": recipe.stages[stage].global_batch,
            "ranks": ranks,
            "micro_batches": args.micro_batches,
            "steps": args.steps,
            "need": args.need,
            "is_synthetic": args.synthetic,
            "prefetch": recipe.data.prefetch,
            "seed": args.seed,
        },
        "costs": {},
        "batches": {},
        "loaders": {},
    }
    console.print("costs of a sample", markup=False)
    draws = first.order.draws(0)[: max(16, 2 * first.order.micro_batch)]
    for name, cost in measure_costs(first.dataset, first.collator, draws, repeats=args.repeats).items():
        result["costs"][name] = {"label": cost.label, "milliseconds": cost.milliseconds, "per": cost.per}
    for name, (padding, imbalance) in measure_waste(first, steps=args.steps, ranks=ranks).items():
        result["batches"][name] = {"padding": padding, "imbalance": imbalance}
    # the same for all, so that all load the same micro-batches
    skipped = max(workers) * recipe.data.prefetch + 1
    runs = {
        f"{batching.name}_{number}": LoaderRun(
            data, ranks=ranks, workers=number, skipped=skipped, micro_batches=args.micro_batches
        )
        for batching, data in opened.items()
        for number in workers
    }
    return result, _time(args, runs, opened, result, console)


def _time(
    args: argparse.Namespace,
    runs: dict[str, LoaderRun],
    opened: dict[Batching, StageData],
    result: Result,
    console: Console,
) -> bool:
    """Rounds of all loaders, their rows in the result; whether Ctrl-C ended them."""
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=args.repeats * len(runs))
        timings = interleave(
            {name: one.seconds for name, one in runs.items()},
            repeats=args.repeats,
            warmup=0,
            seed=args.seed,
            advance=lambda name: progress.update(task, advance=1, description=name),
        )
    if not timings.num_rounds:
        raise KeyboardInterrupt
    result["config"]["rounds"] = timings.num_rounds
    labels = {one.name: one.label for one in opened}
    floor = next(iter(timings.seconds.values()))
    for name, seconds in timings.seconds.items():
        batching, _, number = name.rpartition("_")
        ratio, spread = ratio_and_spread(seconds, floor)
        one, median = runs[name], statistics.median(seconds)
        rate = one.samples / median
        result["loaders"][name] = {
            "label": labels[batching],
            "workers": int(number),
            "samples_per_second": rate,
            "images_per_second": one.images / median,
            "tokens_per_second": one.tokens / median,
            "ratio_to_first": ratio,
            "spread": spread,
            "bad": one.bad,
            "need_factor": None if args.need is None else rate / args.need,
        }
    return timings.is_interrupted


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: hardware, costs, batches, loaders."""
    config = result["config"]
    lines = [
        f"**{setting_line(result)}**",
        "",
        f"Stage {config['stage']} of {config['recipe']}: micro-batches of {config['micro_batch']}, steps of "
        f"{config['global_batch']} samples over {config['ranks']} processes.",
        "",
        "| part | ms | a second and core |",
        "|---|---|---|",
    ]
    for cost in result["costs"].values():
        rate = f"{1e3 / cost['milliseconds']:,.0f} {cost['per']}s"
        lines.append(
            f"| {cost['label']} | {cost['milliseconds']:.2f} an {cost['per']} | {rate} |".replace("an s", "a s")
        )
    lines += ["", "| batches | padding | imbalance | goals |", "|---|---|---|---|"]
    for name, row in result["batches"].items():
        is_met = row["padding"] <= MAX_PADDING and row["imbalance"] <= MAX_IMBALANCE
        lines.append(f"| {name} | {row['padding']:.1%} | {row['imbalance']:.3f} | {'met' if is_met else 'missed'} |")
    lines += [
        "",
        "| loader | workers | samples/s | images/s | tokens/s | spread | bad | x need |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["loaders"].values():
        factor = row["need_factor"]
        told = "" if factor is None else f"{factor:.1f} ({'met' if factor >= MIN_FACTOR else 'missed'})"
        lines.append(
            f"| {row['label']} | {row['workers']} | {row['samples_per_second']:,.1f} | {row['images_per_second']:,.1f} | "
            f"{row['tokens_per_second']:,.0f} | {row['spread']:.2f} | {row['bad']} | {told} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
