"""Write a checkpoint anew: into fewer or more files, without its optimizer, or out of a checkpoint of DeepSpeed.

A checkpoint of ours speaks of whole tensors, never of ranks: one that was saved by any number of processes, at any
expert-parallel size and ZeRO stage, is continued by any other as it is. Resharding only changes which file holds what:
it merges the files of many ranks, or splits large ones. Everything else is carried over, bit for bit: masters, moments,
steps, learning rates, counters, random number generators, configuration and state. The source is read once, its
checksums are compared meanwhile, and the target appears when all of it is right and on the disk.

SOURCE: a checkpoint (runs/a/checkpoints/sparse-000160), a run's folder (its newest valid one), or a checkpoint of
DeepSpeed, plain or universal, with stock MoE layers or AutoEP. TARGET: the folder to write, such as
runs/b/checkpoints/sparse-000160; with --name, the folder in which to write that name. Training knows the stage of a
checkpoint by its name, so keep it where training should go on. Where runs/b is no run yet it gets the recipe and the
processor of runs/a, so that training goes on there (with output_dir=runs/b) and the model loads.

--drop-optimizer: masters become weights (of --dtype, if given), moments go: a third of the bytes. A model can be loaded,
exported and trained further from the result as a new run or stage; the run itself cannot go on.
--dtype otherwise changes the weights of what is not trained; masters and moments stay float32, so that going on is
exact.

--whole: also write the weights that a checkpoint leaves out because no stage has trained them (train.checkpoint.
save_frozen: false), so that the result needs no other folder. Without it the result leaves out the same ones.

A checkpoint of DeepSpeed has no model configuration: --config gives it. --recipe and --stage say to which stage its
steps belong, which training needs to go on from it.

Examples:
    python tools/reshard.py runs/a runs/b/checkpoints/sparse-000160
    python tools/reshard.py runs/a small/checkpoints/sparse-000160 --drop-optimizer --dtype bfloat16
    python tools/reshard.py old_run imported/checkpoints/tune-001000 --config model/ --recipe old.yaml --stage tune
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from terminal import DONE, byte_progress, make_parser, parse_bytes, run

if TYPE_CHECKING:
    from moe_lvlm.checkpoint.reshard import Reshard


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--files", type=int, metavar="N", help="how many files hold the tensors")
    files.add_argument("--max-file-size", type=parse_bytes, metavar="SIZE", help="as few as this allows (default: 5GB)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of weights; see above")
    parser.add_argument("--drop-optimizer", action="store_true", help="keep the weights alone")
    parser.add_argument("--whole", action="store_true", help="write the weights that the source leaves out, too")
    parser.add_argument("--name", help="the checkpoint's name; TARGET is then the folder of checkpoints")
    parser.add_argument("--tag", help="which checkpoint of DeepSpeed (default: the one that its `latest` names)")
    parser.add_argument("--config", type=Path, metavar="PATH", help="config.json, or a folder with it, for DeepSpeed's")
    parser.add_argument("--recipe", help="the recipe by which a checkpoint of DeepSpeed was trained")
    parser.add_argument("--stage", help="the recipe's stage to which its steps belong")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that name")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    return run(lambda: _reshard(args))


def _reshard(args: argparse.Namespace) -> int:
    from moe_lvlm.checkpoint.layout import check_name  # after --help, which needs no torch
    from moe_lvlm.checkpoint.model_folder import as_dtype
    from moe_lvlm.checkpoint.original import open_original
    from moe_lvlm.checkpoint.reshard import DEFAULT_FILE_BYTES, name_problem, plan_reshard
    from moe_lvlm.checkpoint.rewrite import check_target
    from moe_lvlm.config.load import load_recipe
    from moe_lvlm.models.load import CHECKPOINTS
    from moe_lvlm.training.folder import adopt_run

    target = args.target / args.name if args.name else args.target.absolute()
    check_name(target.name)
    recipe = None if args.recipe is None else load_recipe(args.recipe)
    original = open_original(args.source, tag=args.tag, config=args.config, recipe=recipe, stage=args.stage, log=_say)
    plan = plan_reshard(
        original,
        num_files=args.files,
        max_file_bytes=args.max_file_size or DEFAULT_FILE_BYTES,
        dtype=None if args.dtype is None else as_dtype(args.dtype),
        keeps_optimizer=not args.drop_optimizer,
        is_whole=args.whole,
    )
    if args.config is not None:
        _check_model(args.config, plan)
    check_target(target, is_overwriting=args.overwrite)
    _describe(plan, target)
    for note in (*plan.notes, name_problem(plan, target.name)):
        if note is not None:
            print(f"note: {note}")
    if args.dry_run:
        print("dry run: nothing was written")
        return DONE
    later: list[str] = []  # said when the bar is gone
    with ExitStack() as held:
        _lock_run(target, held)
        advance = held.enter_context(byte_progress("reshard", plan.num_bytes))
        report = plan.write(
            target.parent, target.name, is_overwriting=args.overwrite, log=later.append, advance=advance
        )
    for line in later:
        print(f"note: {line}")
    if target.parent.name == CHECKPOINTS and plan.original.path.parent.name == CHECKPOINTS:
        for name in adopt_run(plan.original.path.parents[1], target.parents[1]):
            print(f"copied {name} of {plan.original.path.parents[1]} to {target.parents[1]}")
    print(f"wrote {report.path}: {report.bytes:,} bytes in {report.seconds:.1f} s")
    return DONE


def _lock_run(target: Path, held: ExitStack) -> None:
    """Nobody may train in the run to whose checkpoints one is added."""
    from moe_lvlm.training.lock import lock_folder

    run_folder = target.parent.parent
    if (run_folder / "recipe.yaml").is_file() and (problem := held.enter_context(lock_folder(run_folder))) is not None:
        _say(problem)


def _check_model(config: Path, plan: Reshard) -> None:
    """ValueError unless an imported checkpoint's tensors are those of the model that --config describes."""
    from moe_lvlm.conversion.check import model_problems
    from moe_lvlm.models.build import config_of

    shapes = {name: next(iter(kinds.values())).shape for name, kinds in plan.tensors.items()}
    if problems := model_problems(config_of(config), shapes):
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{plan.original.path} is not of the model in {config}: {'; '.join(problems[:5])}{more}")


def _describe(plan: Reshard, target: Path) -> None:
    print(f"{plan.original.path}: {plan.original.form}")
    for kind, (count, size) in plan.kinds().items():
        print(f"  kept     {kind:<10} {count:>6} tensors {size:>20,} bytes")
    for kind, size in plan.dropped.items():
        print(f"  dropped  {kind:<10} {'':>6}         {size:>20,} bytes")
    if plan.converted:
        print(f"  {plan.converted} tensors change their type")
    if plan.base is not None:
        count, size = len(plan.base.tensors), plan.base.num_bytes
        print(f"  left out {'weight':<10} {count:>6} tensors {size:>20,} bytes")
    print(f"  random number generators of {len(plan.rng)} ranks")
    print(f"{target}:")
    for file, size in plan.files().items():
        print(f"  {file} {size:>20,} bytes")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
