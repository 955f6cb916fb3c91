"""`moe-lvlm status` and `moe-lvlm logs`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lvlm.command_line import Commands, add_run_argument, command, positive

if TYPE_CHECKING:
    from moe_lvlm.monitoring.status import RunStatus


def add_status(commands: Commands) -> None:
    """Declare `status`."""
    parser = command(
        commands,
        "status",
        "say how runs stand: progress, time left, last numbers, restarts and their reasons",
        "moe-lvlm status runs/quickstart",
        "moe-lvlm status runs/sweep --watch 10",
        "moe-lvlm status runs/* --json",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="the folder of a run, such as runs/quickstart, or one that holds runs",
    )
    parser.add_argument(
        "--json", action="store_true", help="a JSON object (docs/monitoring.md); with --watch one a line"
    )
    parser.add_argument(
        "--watch", type=positive, metavar="SECONDS", help="say it again every so many seconds, until all are done"
    )
    parser.set_defaults(handler=_status)


def _status(arguments: argparse.Namespace) -> None:
    if arguments.watch is None:
        _show_status(arguments)
        return
    try:
        while not all(status.state == "done" for status in _show_status(arguments)):
            time.sleep(arguments.watch)
    except KeyboardInterrupt:
        return  # how one ends it


def _show_status(arguments: argparse.Namespace) -> Sequence[RunStatus]:
    from rich.console import Console

    from moe_lvlm.monitoring.folder import find_runs
    from moe_lvlm.monitoring.page import status_page, status_table
    from moe_lvlm.monitoring.status import read_status

    statuses = [read_status(run) for run in find_runs(arguments.runs)]
    if arguments.json:
        content = {"runs": [status.to_json() for status in statuses]}
        print(json.dumps(content, indent=None if arguments.watch else 2, allow_nan=False), flush=True)
        return statuses
    console = Console(highlight=False)
    if arguments.watch and console.is_terminal:
        console.clear()
    console.print(status_page(statuses[0]) if len(statuses) == 1 else status_table(statuses), crop=False)
    return statuses


def add_logs(commands: Commands) -> None:
    """Declare `logs`."""
    parser = command(
        commands,
        "logs",
        "print what the ranks of a run's SLURM jobs said",
        "moe-lvlm logs runs/quickstart -f",
        "moe-lvlm logs runs/quickstart --rank 3 --attempt 2",
        "moe-lvlm logs runs/quickstart --errors",
    )
    add_run_argument(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=_rank, metavar="N", help="the rank (default: 0)")
    which.add_argument("--all", action="store_true", help="all ranks, each line with its rank")
    which.add_argument(
        "--errors",
        action="store_true",
        help="the last traceback or error of each rank of the newest attempt that failed",
    )
    which.add_argument("--job", action="store_true", help="the log of the batch script")
    parser.add_argument("--attempt", type=positive, metavar="N", help="default: the newest")
    parser.add_argument(
        "-n", "--lines", type=positive, default=40, metavar="LINES", help="last lines of each (default: 40)"
    )
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on with what is added, until the run is done or Ctrl-C"
    )
    parser.set_defaults(handler=_logs)


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number from 0")
    return int(text)


def _logs(arguments: argparse.Namespace) -> None:
    from moe_lvlm.monitoring import printing
    from moe_lvlm.monitoring.folder import the_run

    run = the_run(arguments.run)
    if arguments.follow and (arguments.errors or arguments.attempt):
        raise ValueError("--follow goes with the newest attempt; allowed beside it: --rank, --all, --job and --lines")
    try:
        if arguments.errors:
            printing.print_errors(run, attempt=arguments.attempt, file=sys.stdout)
        elif arguments.job:
            printing.print_job(
                run, attempt=arguments.attempt, lines=arguments.lines, is_followed=arguments.follow, file=sys.stdout
            )
        else:
            rank = None if arguments.all else arguments.rank or 0
            printing.print_ranks(
                run,
                rank=rank,
                attempt=arguments.attempt,
                lines=arguments.lines,
                is_followed=arguments.follow,
                file=sys.stdout,
            )
    except KeyboardInterrupt:
        if not arguments.follow:
            raise
