"""Say what a recipe's stage will take before it runs: memory of each GPU by kind, time of a step by kind, settings that fit.

Nothing is trained, downloaded or allocated: the model is built without memory and each of its parts is run once forward and
backward on tensors that have a shape only, so that memory is what torch and transformers really keep. Time is a roofline
over the same operations, all-to-all and ZeRO's traffic (docs/scaling.md says what is assumed).

RECIPE is a name from `moe-lvlm recipes` or a path, with key=value behind it as in training. Sizes of published models that
the project's recipes name are known; for others give --config-dir with FOLDER/<name>/config.json, or have them at hand.

The table of settings holds what does not change the result: DeepSpeed's file, expert parallelism, gradient checkpointing.
What training would refuse is not in it. --any-micro-batch adds other micro-batches: those change statistics of routers.

--scaling draws how the stage scales over 1 to 128 nodes, with the best setting that fits at each: --png FILE. With several
recipes, separated by commas, a line each. --measure puts this machine in the place of a --gpu, as short probes find it.

Examples:
    python tools/estimate.py ltdr/ltdr_stablelm --gpu a800-80g --nodes 1 --tail-share 0.13
    python tools/estimate.py ltdr/ltdr_phi2 --gpu h100-80g --nodes 4 data.batching=packed data.balance=true --json plan.json
    python tools/estimate.py ltdr/ltdr_stablelm,ltdr/ltdr_phi2 --scaling --gpu a800-80g --png scaling.png data.batching=packed

Exit status: 0 done, also where nothing fits; 2 a mistake in the arguments or the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terminal import DONE, make_parser, run

from moe_lvlm.command_line import positive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moe_lvlm.estimation.hardware import Hardware
    from moe_lvlm.estimation.plan import Planner


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stage", help="a stage's name (default: the last)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--gpu", default="a800-80g", help="a800-80g, a100-80g, h100-80g, h200, ... (default: %(default)s)"
    )
    machine.add_argument("--measure", action="store_true", help="this machine instead, probed")
    machine.add_argument("--nodes", type=positive, default=1)
    machine.add_argument("--gpus-per-node", type=positive, metavar="N", help="default: 8")
    machine.add_argument("--network", type=_network, metavar="NxG", help="adapters of a node, and Gb/s of each: 8x200")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--text-tokens", type=float, metavar="N", help="of a sample in the mean (default: 190)")
    samples.add_argument("--images", type=int, metavar="N", help="of a sample (default: 1)")
    samples.add_argument("--text-only", type=float, metavar="SHARE", help="samples without an image (default: 0.06)")
    samples.add_argument(
        "--tail-share", type=float, default=0.0, metavar="SHARE", help="tokens that take tail_k experts"
    )
    parser.add_argument("--any-micro-batch", action="store_true", help="other micro-batches too")
    parser.add_argument("--most", type=positive, default=10, metavar="N", help="rows of the table (default: 10)")
    parser.add_argument("--scaling", action="store_true", help="over nodes; see above")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the figure of --scaling")
    parser.add_argument("--config-dir", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_intermixed_args(argv)
    if args.png is not None and not args.scaling:
        parser.error("--png: the figure is that of --scaling")
    if "," in args.recipe and not args.scaling:
        parser.error("several recipes: allowed with --scaling")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    return run(lambda: _scaling(args) if args.scaling else _estimate(args))


def _estimate(args: argparse.Namespace) -> int:
    from moe_lvlm.estimation.report import estimate_json, estimate_page  # after --help, which needs no torch

    planner = _planner(args, args.recipe)
    plan = planner.plan(planner.as_it_stands)
    with _progress("settings") as advance:
        fitting, short = planner.search(any_micro_batch=args.any_micro_batch, advance=advance)
    page = estimate_page(planner, plan, fitting, short, most=args.most)
    _write(args, page, estimate_json(planner, plan, fitting, short))
    return DONE


def _scaling(args: argparse.Namespace) -> int:
    from moe_lvlm.estimation.scaling import scale, scaling_figure, scaling_json, scaling_page

    curves, pages = {}, []
    for name in args.recipe.split(","):
        planner = _planner(args, name)
        with _progress(name) as advance:
            curves[planner.recipe.name] = points = scale(planner, advance=advance)
        title = f"{planner.recipe.name}, stage {planner.settings.name}, nodes of {planner.hardware.devices} {args.gpu}"
        pages.append(f"# {title}\n\n{scaling_page(points)}\n")
    if args.png is not None:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        scaling_figure(curves, args.png)
        print(f"wrote {args.png}", file=sys.stderr)
    _write(args, "\n".join(pages), {name: scaling_json(points) for name, points in curves.items()})
    return DONE


def _planner(args: argparse.Namespace, name: str) -> Planner:
    from moe_lvlm.config.load import load_recipe
    from moe_lvlm.estimation.architectures import stage_model
    from moe_lvlm.estimation.plan import Planner
    from moe_lvlm.estimation.samples import SampleLengths

    recipe = load_recipe(name, args.overrides)
    stage = len(recipe.stages) - 1 if args.stage is None else recipe.stage_index(args.stage)
    given = {"mean_text": args.text_tokens, "images": args.images, "text_only": args.text_only}
    lengths = SampleLengths(
        max_length=recipe.data.max_length, **{key: value for key, value in given.items() if value is not None}
    )
    return Planner(
        recipe=recipe,
        stage=stage,
        model=stage_model(recipe, stage, config_dir=args.config_dir),
        hardware=_hardware(args),
        nodes=args.nodes,
        lengths=lengths,
        tail_share=args.tail_share,
    )


def _hardware(args: argparse.Namespace) -> Hardware:
    import torch

    from moe_lvlm.estimation.hardware import find_hardware, measure_hardware

    if args.measure:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return measure_hardware(device, devices=args.gpus_per_node or 1)
    hardware = find_hardware(args.gpu)
    if args.gpus_per_node is not None:
        hardware = replace(hardware, devices=args.gpus_per_node)
    return hardware if args.network is None else hardware.with_network(*args.network)


def _network(text: str) -> tuple[int, float]:
    adapters, cross, gigabits = text.partition("x")
    if not cross or not adapters.isdecimal() or not gigabits.isdecimal() or not int(adapters) or not int(gigabits):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: adapters of a node x Gb/s of each, such as 8x200")
    return int(adapters), float(gigabits)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[], None]]:
    """A count on stderr of what has been estimated."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:.0f} estimated"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda: progress.update(task, advance=1)


def _write(args: argparse.Namespace, page: str, result: Any) -> None:
    print(page)
    for path, text in ((args.json, json.dumps(result, indent=2)), (args.markdown, page)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text.rstrip()}\n", encoding="utf-8")
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
