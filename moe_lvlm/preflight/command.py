"""`moe-lvlm preflight`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moe_lvlm.command_line import Commands, command, count, positive

if TYPE_CHECKING:
    from moe_lvlm.preflight.verdict import Verdict

_DEFAULTS: Mapping[str, Any] = {"mib": 64, "timeout": 60.0, "nodes": ()}
_NODE_OPTIONS = ("gpus", "min_gpu_memory", "min_memory", "min_shared_memory", "disk", "master", "site_command")
_FABRIC_OPTIONS = ("mib", "timeout", "min_gigabytes", "nodes", "cuda")


class PreflightOptionError(ValueError):
    """An option that this check does not have, or a value that it cannot use."""


def add_preflight(commands: Commands) -> None:
    """Declare the command."""
    parser = command(
        commands,
        "preflight",
        "check a node, or what lies between nodes, before a job trains there",
        "moe-lvlm preflight node --gpus 8 --min-gpu-memory 70 --disk /scratch:200",
        "srun --ntasks-per-node 8 moe-lvlm preflight fabric --nodes n1,n2 --min-gigabytes 20",
        "srun --ntasks-per-node 1 moe-lvlm preflight pairs --nodes n1,n2,n3",
    )
    parser.add_argument(
        "check",
        metavar="CHECK",
        nargs="?",
        choices=("node", "fabric", "pairs"),
        default="node",
        help="node: this machine (the default). fabric: all ranks meet and all-reduce, started by srun or torchrun "
        "(RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). pairs: where that failed, nodes "
        "two by two, to find the bad one; one process a node, RANK counts nodes",
    )
    parser.add_argument(
        "--lines",
        action="store_true",
        help="for scripts: `NODE ok KEY=VALUE ...` or `NODE bad REASON`, and of the fabric `fabric ok GIGABYTES ...` "
        "or `fabric failed REASON`. `node` then ends with status 0 either way",
    )
    _add_node_options(parser)
    _add_fabric_options(parser)
    parser.set_defaults(handler=_preflight)


def _add_node_options(parser: argparse.ArgumentParser) -> None:
    node = parser.add_argument_group("node (status 1 if something is bad)")
    node.add_argument("--gpus", type=count, metavar="N", help="at least N GPUs; 0: do not look at GPUs")
    node.add_argument("--min-gpu-memory", type=_amount, metavar="GIB", help="free on each GPU")
    node.add_argument("--min-memory", type=_amount, metavar="GIB", help="host memory available")
    node.add_argument(
        "--min-shared-memory", type=_amount, metavar="GIB", help="free in /dev/shm, for data workers (default: 1)"
    )
    node.add_argument(
        "--disk", type=_disk, metavar="PATH:GIB", action="append", help="free and writable there; may be repeated"
    )
    node.add_argument("--master", metavar="HOST", help="a host that must resolve: where the ranks will meet")
    node.add_argument(
        "--command",
        dest="site_command",
        metavar="LINE",
        help="a shell line of your own; a status above 0 is bad, its last line the reason; it has 60 s",
    )


def _add_fabric_options(parser: argparse.ArgumentParser) -> None:
    fabric = parser.add_argument_group("fabric and pairs (status 3 if something is bad)")
    fabric.add_argument("--mib", type=positive, metavar="N", help="size of the timed all-reduce (default: 64)")
    fabric.add_argument(
        "--timeout", type=_amount, metavar="SECONDS", help="to meet, and again for the tests (default: 60)"
    )
    fabric.add_argument("--min-gigabytes", type=_amount, metavar="X", help="bus bandwidth asked for, GB a second")
    fabric.add_argument(
        "--nodes", type=_nodes, metavar="n1,n2,...", help="names of the nodes, in the order of the ranks"
    )
    fabric.add_argument(
        "--cuda", action="store_true", default=None, help="a rank without a GPU is bad, also if no rank has one"
    )


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number above 0")
    return number


def _disk(text: str) -> tuple[Path, float]:
    path, colon, gib = text.rpartition(":")
    if not colon or not path:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a path, a colon and GiB, such as /scratch:200")
    return Path(path), _amount(gib)


def _nodes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if "[" in text or len(set(names)) < len(names) or any(not name or " " in name for name in names):
        raise argparse.ArgumentTypeError(
            f"{text!r}; allowed: different names with commas between; `scontrol show hostnames` writes out n[1-4]"
        )
    return names


def _preflight(arguments: argparse.Namespace) -> None:
    options = {name: getattr(arguments, name) for name in (*_NODE_OPTIONS, *_FABRIC_OPTIONS)}
    foreign = _FABRIC_OPTIONS if arguments.check == "node" else _NODE_OPTIONS
    for name in foreign:
        if options[name] is not None:
            option = "command" if name == "site_command" else name.replace("_", "-")
            raise PreflightOptionError(f"--{option}: not an option of `preflight {arguments.check}`")
    given = {**_DEFAULTS} | {name: value for name, value in options.items() if value is not None}
    if arguments.check == "node":
        raise SystemExit(_check_node(given, has_lines=arguments.lines))
    _check_fabric(arguments.check, given, has_lines=arguments.lines)


def _check_node(given: Mapping[str, Any], *, has_lines: bool) -> int:
    from moe_lvlm.preflight.finding import node_lines, table
    from moe_lvlm.preflight.host import node_name
    from moe_lvlm.preflight.node import NodeDemands, check_node

    findings = check_node(
        NodeDemands(
            gpus=given.get("gpus"),
            min_gpu_memory=given.get("min_gpu_memory"),
            min_memory=given.get("min_memory"),
            min_shared_memory=given.get("min_shared_memory", 1.0),
            disks=given.get("disk", ()),
            master=given.get("master"),
            command=given.get("site_command"),
        )
    )
    if has_lines:
        print("\n".join(node_lines(node_name(), findings)))
        return 0
    is_bad = any(finding.problem for finding in findings)
    print(table(findings))
    print(f"\n{node_name()}: {'bad' if is_bad else 'ok'}")
    return int(is_bad)


def _check_fabric(check: str, given: Mapping[str, Any], *, has_lines: bool) -> NoReturn:
    from moe_lvlm.preflight.ending import end_after
    from moe_lvlm.preflight.place import read_place

    place = read_place(given["nodes"], ranks_are_nodes=check == "pairs")
    # Above all that the check itself allows: to import torch, to meet, and one round of tests, of pairs up to three.
    end_after((2 if check == "fabric" else 4) * given["timeout"] + 240)
    # What libraries print to stdout would stand between our lines: it goes to stderr.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as output:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def say(verdict: Verdict) -> None:
            print("\n".join(verdict.lines()) if has_lines else _describe(verdict), file=output, flush=True)

        from moe_lvlm.preflight.work import FabricDemands

        demands = FabricDemands(
            mib=given["mib"],
            limit=given["timeout"],
            min_gigabytes=given.get("min_gigabytes"),
            needs_cuda=given.get("cuda", False),
        )
        if check == "fabric":
            from moe_lvlm.preflight.fabric import check_fabric as run
        else:
            from moe_lvlm.preflight.pairs import check_pairs as run
        status = run(place, demands, say)
    os._exit(status)  # threads may hang in a collective, where nothing else ends them


def _describe(verdict: Verdict) -> str:
    """For people."""
    if verdict.failure is not None:
        return "\n".join([f"fabric: failed: {verdict.failure}", *(f"  {n}: {why}" for n, why in verdict.bad.items())])
    facts = ", ".join(f"{key} {value}" for key, value in verdict.facts.items())
    speed = "" if verdict.gigabytes is None else f", {verdict.gigabytes:.2f} GB/s bus bandwidth"
    return f"fabric: ok{speed} ({facts})"
