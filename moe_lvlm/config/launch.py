"""What launch/*.sh ask before they start processes: `python -m moe_lvlm.config.launch --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_lvlm.config.deepspeed import check_processes
from moe_lvlm.config.hostfile import Slots, choose_slots, read_hostfile
from moe_lvlm.config.load import load_recipe

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Check, and print `HOST SLOT,SLOT...` for each node of a hostfile. Returns the exit status: 0, or 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m moe_lvlm.config.launch", description=__doc__, allow_abbrev=False)
    parser.add_argument("--name", default="launch", help="what a message begins with")
    parser.add_argument("--processes", type=int, metavar="N", help="in all (without --hostfile)")
    parser.add_argument("--hostfile", type=Path)
    parser.add_argument("--include")
    parser.add_argument("--exclude")
    parser.add_argument("--num-nodes", type=int)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--until", metavar="STAGE")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args(argv)
    try:
        chosen = _chosen(arguments)
        num_processes = sum(map(len, chosen.values())) if chosen else arguments.processes
        check_processes(load_recipe(arguments.recipe, arguments.overrides), num_processes, until=arguments.until)
    except ValueError as error:
        print(f"{arguments.name}: error: {error}", file=sys.stderr)
        return USER_ERROR
    for host, slots in chosen.items():
        print(host, ",".join(map(str, slots)))
    return 0


def _chosen(arguments: argparse.Namespace) -> Slots:
    """The slots of each node; none without a hostfile."""
    if arguments.hostfile is None:
        return {}
    return choose_slots(
        read_hostfile(arguments.hostfile),
        include=arguments.include,
        exclude=arguments.exclude,
        num_nodes=arguments.num_nodes,
        num_processes=arguments.nproc,
    )


if __name__ == "__main__":
    raise SystemExit(main())
