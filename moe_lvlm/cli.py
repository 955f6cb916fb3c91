"""The `moe-lvlm` command. What needs torch is imported by the handler of a command, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lvlm import __version__
from moe_lvlm.command_line import Commands, add_recipe_arguments, add_run_argument, command, positive
from moe_lvlm.monitoring.command import add_logs, add_status
from moe_lvlm.preflight.command import add_preflight
from moe_lvlm.slurm.command import add_submit

if TYPE_CHECKING:
    from moe_lvlm.config.recipe import Recipe

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
# What a user can cause and mend. Anything else is ours and keeps its traceback.
_USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the whole line, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="moe-lvlm",
        description="Train, evaluate and look into mixture-of-experts vision-language models.",
        epilog="example: moe-lvlm train quickstart --dry-run",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_chat(commands)
    _add_recipes(commands)
    add_submit(commands)
    add_status(commands)
    add_logs(commands)
    add_preflight(commands)
    return parser, commands.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        arguments.handler(arguments)
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _USER_ERRORS as error:
        if arguments.debug:
            raise
        _complain(f"error: {error}")
        return USER_ERROR
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse. Positional arguments may stand before, between and after options, which a subparser does not allow."""
    parser, commands = build_parser()
    if argv and argv[0] in commands:
        return commands[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def _complain(message: str) -> None:
    """To stderr; of the processes that torchrun starts, only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")


def _add_train(commands: Commands) -> None:
    parser = command(
        commands,
        "train",
        "train the stages of a recipe, or go on where an unfinished run stopped",
        "torchrun --standalone --nproc_per_node 2 -m moe_lvlm train quickstart train.precision=bf16",
        "moe-lvlm train ltdr/ltdr_stablelm scale=tiny",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, parameters and expected memory; train nothing",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on where an unfinished run stopped (the default)")
    start.add_argument(
        "--fresh", action="store_true", help="start from the beginning, over what the run's folder holds"
    )
    parser.add_argument("--until", metavar="STAGE", help="end when this stage is done")
    parser.add_argument(
        "--stop-signal",
        choices=("USR1", "USR2"),
        help="a signal that, like SIGTERM, asks to save after the step and to end (for batch systems)",
    )
    parser.set_defaults(handler=_train)


def _train(arguments: argparse.Namespace) -> None:
    stop_signal = None if arguments.stop_signal is None else signal.Signals[f"SIG{arguments.stop_signal}"]
    if stop_signal is not None:
        # until training listens, and from its end to the end of the process; the batch system asks again
        signal.signal(stop_signal, signal.SIG_IGN)
    from moe_lvlm.config.deepspeed import check_processes
    from moe_lvlm.config.load import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.until is not None:
        recipe.stage_index(arguments.until)
    if arguments.dry_run:
        from moe_lvlm.training.dry_run import describe

        print(describe(recipe))
        return
    # find what does not fit before torch is loaded and processes meet
    check_processes(recipe, int(os.environ.get("WORLD_SIZE", "1")))

    from moe_lvlm.checkpoint.ranks import SaveError
    from moe_lvlm.parallel.process_group import leave_world
    from moe_lvlm.training.run import train

    try:
        train(recipe, resume=not arguments.fresh, stop_signal=stop_signal, until=arguments.until)
    except SaveError as error:  # a full disk and the like, said by all ranks in one sentence
        if arguments.debug:
            raise
        _complain(f"error: {error}")
        raise SystemExit(FAILED) from error
    leave_world()


def _add_eval(commands: Commands) -> None:
    parser = command(
        commands,
        "eval",
        "answer the questions of a run's evaluation sets by free generation, and score the answers",
        "moe-lvlm eval runs/quickstart --limit 100",
    )
    add_run_argument(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="at most N records of each set")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="default: the recipe's evaluation.batch_size")
    _add_device_arguments(parser)
    parser.set_defaults(handler=_eval)


def _eval(arguments: argparse.Namespace) -> None:
    from moe_lvlm.evaluation.runner import evaluate

    evaluate(
        arguments.run,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
    )


def _add_report(commands: Commands) -> None:
    parser = command(
        commands,
        "report",
        "draw a run's losses, scores and routing into one HTML page",
        "moe-lvlm report runs/quickstart",
    )
    add_run_argument(parser)
    parser.set_defaults(handler=_report)


def _report(arguments: argparse.Namespace) -> None:
    from moe_lvlm.analysis.report import write_report

    print(f"report: {write_report(arguments.run)}")


def _add_chat(commands: Commands) -> None:
    parser = command(
        commands,
        "chat",
        "ask a run's model about an image: one question, or a conversation when none is given",
        'moe-lvlm chat runs/quickstart --image scene.png "what color is the background ?"',
    )
    add_run_argument(parser)
    parser.add_argument("--image", type=Path, help="the image to ask about (left out: text alone)")
    parser.add_argument(
        "question", metavar="QUESTION", nargs="?", help="left out: questions are read from the terminal"
    )
    parser.set_defaults(handler=_chat)


def _chat(arguments: argparse.Namespace) -> None:
    from moe_lvlm.evaluation.chat import chat

    chat(arguments.run, arguments.image, arguments.question)


def _add_recipes(commands: Commands) -> None:
    parser = command(
        commands,
        "recipes",
        "list the recipes, or print one with its defaults and overrides filled in",
        "moe-lvlm recipes quickstart stages.0.steps=20",
        "moe-lvlm recipes ltdr/dar scale=tiny",
    )
    add_recipe_arguments(parser, recipe_is_optional=True)
    parser.add_argument("--folder", action="store_true", help="print only the folder that the recipe's run goes to")
    parser.set_defaults(handler=_recipes)


def _recipes(arguments: argparse.Namespace) -> None:
    from moe_lvlm.config.load import dump_recipe, list_recipes, load_recipe, recipe_path

    if arguments.recipe is None:
        names = list_recipes()
        width = max(map(len, names))
        for name in names:
            first_line = recipe_path(name).read_text(encoding="utf-8").partition("\n")[0]
            print(f"{name:{width}}  {first_line.removeprefix('#').strip()}")
        return
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    print(_run_folder(recipe) if arguments.folder else dump_recipe(recipe).rstrip())


def _run_folder(recipe: Recipe) -> Path:
    return Path(recipe.output_dir or Path("runs") / recipe.name)
