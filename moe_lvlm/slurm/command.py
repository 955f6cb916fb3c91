"""`moe-lvlm submit`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from moe_lvlm.command_line import Commands, add_recipe_arguments, command, count, positive


def add_submit(commands: Commands) -> None:
    """Declare the command."""
    parser = command(
        commands,
        "submit",
        "write a SLURM job that trains a recipe, check it and submit it",
        "moe-lvlm submit ltdr/ltdr_stablelm --nodes 1 --gpus-per-node 8 --time 2-00:00:00",
        "moe-lvlm submit mocle/llava_mocle --nodes 2 --partition a800 --account vision --dry-run",
        "moe-lvlm submit quickstart scale=tiny --gpus-per-node 0 --processes-per-node 2 --sweep seed=0,1,2",
        "moe-lvlm submit runs/my_run/slurm/job.sbatch          (again, as it stands there)",
    )
    add_recipe_arguments(parser)
    _add_resources(parser.add_argument_group("what is asked of SLURM (a site's file has the same keys)"))
    _add_behaviour(parser.add_argument_group("the job"))
    _add_container(parser.add_argument_group("container"))
    parser.add_argument(
        "--site",
        type=Path,
        metavar="FILE",
        help="the site's defaults (default: $MOE_LVLM_SITE, or ~/.config/moe_lvlm/slurm.yaml)",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="submit although files of the recipe are not seen from this machine",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script and what SLURM says of it; write and submit nothing"
    )
    parser.set_defaults(handler=_submit)


def _add_resources(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--nodes", type=positive, metavar="N", help="default: 1")
    group.add_argument(
        "--gpus-per-node", type=count, metavar="N", help="one process a GPU; 0 trains on CPUs (default: 8)"
    )
    group.add_argument("--gpu-type", metavar="TYPE", help="such as a800, where SLURM knows types")
    group.add_argument("--processes-per-node", type=positive, metavar="N", help="without GPUs (default: 1)")
    group.add_argument(
        "--cpus-per-process", type=positive, metavar="N", help="default: 1 and the recipe's data workers"
    )
    group.add_argument("--memory", metavar="SIZE", help="of a node, such as 500G; 0 is all of it")
    group.add_argument("--time", metavar="LIMIT", help="such as 12:00:00 or 2-00:00:00 (default: the partition's)")
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        group.add_argument(f"--{name}", metavar=name.upper(), help=f"SLURM's --{name}")
    group.add_argument("--exclude", metavar="NODES", help="nodes that are not to be used")
    group.add_argument("--exclusive", action="store_const", const=True, help="no other job on the nodes")
    group.add_argument("--dependency", metavar="WHAT", help="such as afterok:1234")
    group.add_argument("--job-name", metavar="NAME", help="default: the recipe's")
    group.add_argument(
        "--sbatch",
        action="append",
        metavar="OPTION",
        help="another option of sbatch, such as --sbatch=--mail-type=FAIL; may be repeated",
    )


def _add_behaviour(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--until", metavar="STAGE", help="train up to the end of this stage")
    group.add_argument("--chain", action="store_true", help="a job for each stage, each after the one before")
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="an array of jobs, one for each value; repeated: for all combinations",
    )
    group.add_argument("--max-parallel", type=positive, metavar="N", help="of a sweep, so many jobs at a time")
    group.add_argument(
        "--stop-signal", choices=("USR1", "USR2"), help="comes before the end: save and be queued again (default: USR1)"
    )
    group.add_argument("--stop-before", type=positive, metavar="SECONDS", help="how long before the end (default: 300)")
    group.add_argument(
        "--max-attempts",
        type=positive,
        metavar="N",
        help="in a row without a new checkpoint, then give up (default: 3)",
    )
    group.add_argument("--no-preflight", action="store_true", help="train without looking at the nodes first")


def _add_container(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--container", metavar="IMAGE", help="train inside this image")
    group.add_argument("--container-runtime", choices=("pyxis", "apptainer"), help="default: pyxis")
    group.add_argument(
        "--container-mount",
        action="append",
        metavar="SOURCE:TARGET",
        help="a folder that the container sees; may be repeated",
    )
    group.add_argument("--container-python", metavar="PYTHON", help="the image's interpreter (default: python3)")


_SAME = (
    "nodes", "gpus_per_node", "gpu_type", "processes_per_node", "cpus_per_process", "memory", "time", "partition",
    "account", "qos", "constraint", "reservation", "exclude", "exclusive", "dependency", "job_name", "sbatch",
    "stop_signal", "stop_before", "max_attempts",
)  # fmt: skip


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, by the names of `JobSettings`."""
    asked: dict[str, Any] = {name: value for name in _SAME if (value := getattr(arguments, name)) is not None}
    container = {
        "image": arguments.container,
        "runtime": arguments.container_runtime,
        "mounts": arguments.container_mount,
        "python": arguments.container_python,
    }
    if any(value is not None for value in container.values()):
        asked["container"] = {name: value for name, value in container.items() if value is not None}
    if arguments.no_preflight:
        asked["preflight"] = {"enabled": False}
    return asked


def _submit(arguments: argparse.Namespace) -> None:
    from moe_lvlm.slurm.plan import Wish
    from moe_lvlm.slurm.site import JobError, default_site, job_settings
    from moe_lvlm.slurm.submit import dry_run, submit, submit_again

    if arguments.recipe.endswith(".sbatch"):
        if arguments.overrides or _asked(arguments):
            raise JobError(f"{arguments.recipe}: a script says itself what it asks for; edit it, or name a recipe")
        script = Path(arguments.recipe)
        if not script.is_file():
            raise JobError(f"{script}: no such file")
        print(f"job     {submit_again(script)}")
        return
    settings = job_settings(arguments.site or default_site(), _asked(arguments))
    wish = Wish(
        recipe=arguments.recipe,
        overrides=tuple(arguments.overrides),
        sweep=tuple(arguments.sweep),
        max_parallel=arguments.max_parallel,
        chain=arguments.chain,
        until=arguments.until,
        directory=Path.cwd(),
        command=" ".join(shlex.join(["moe-lvlm", *sys.argv[1:]]).split()),
    )
    if arguments.dry_run:
        print(dry_run(wish, settings, lambda line: print(line, file=sys.stderr)), end="")
        return
    submitted = submit(wish, settings, allows_missing=arguments.allow_missing)
    per_node = (
        f"{settings.gpus_per_node} GPUs" if settings.gpus_per_node else f"{settings.num_processes_per_node} processes"
    )
    for one in submitted:
        runs = list(one.job.runs)
        stage = f", up to stage {one.job.stage}" if one.job.stage else ""
        tasks = f", {len(runs)} runs" if len(runs) > 1 else ""
        print(f"job     {one.id}: {settings.nodes} node(s) with {per_node}{stage}{tasks}")
        print(f"script  {one.job.script}")
    ids = ",".join(one.id for one in submitted)
    run = runs[0] if len(runs) == 1 else one.job.script.parent
    print(f"watch   moe-lvlm status {shlex.quote(str(run))}")
    if len(runs) == 1:
        print(f"        moe-lvlm logs {shlex.quote(str(run))} --follow")
    print(f"        squeue --jobs={ids}")
    print(f"end     scancel {ids.replace(',', ' ')}")
