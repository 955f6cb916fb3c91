"""The sbatch script of a job: written from a template, and read again for mistakes that SLURM says nothing about."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from moe_lvlm import __version__
from moe_lvlm.slurm.settings import ContainerSettings, JobSettings
from moe_lvlm.slurm.site import JobError

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a script is written from.

    title: what is trained, in words. path: where the script will lie. runs: folders of the runs, absolute; several
    are the tasks of an array. recipe: the recipe's file in each run's `slurm` folder. log: SLURM's pattern for the
    script's own output. until: the stage after which to stop. cpus_per_process: cores of each process. python: the
    interpreter. directory: where the job works. command: what the user called. max_parallel: tasks of an array at a time.
    """

    title: str
    name: str
    path: Path
    runs: tuple[Path, ...]
    recipe: str
    log: Path
    directory: Path
    job: JobSettings
    cpus_per_process: int
    python: str
    command: str
    until: str | None = None
    max_parallel: int | None = None


def render(script: Script) -> str:
    """The script's text.

    Raises:
        JobError: a path that SLURM or the shell would read as something else.
    """
    for path in (script.path, script.log, script.directory, *script.runs):
        _check_path(path, patterns=path == script.log)
    container = script.job.container
    is_inside = container.image is not None
    environment = Environment(
        loader=PackageLoader("moe_lvlm.slurm"),
        comment_start_string="<#",  # `{#` is bash: ${#ARRAY[@]}
        comment_end_string="#>",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["q"] = lambda value: shlex.quote(str(value))
    return environment.get_template("job.sbatch.j2").render(
        options=_options(script),
        title=script.title,
        version=__version__,
        command=script.command,
        script=script.path,
        runs=script.runs,
        recipe=script.recipe,
        goal="DONE" if script.until is None else f"DONE.{script.until}",
        until=script.until,
        job=script.job,
        python=container.python if is_inside else script.python,
        environment=_settings_of_all(),
        container_options=_container_options(container, script),
        container_command=_container_command(container, script),
        node_checks=_node_checks(script.job),
        fabric_checks=_fabric_checks(script.job),
    )


def _settings_of_all() -> str:
    """`environment.sh` without its head: what the launchers beside SLURM set too."""
    text = (_FOLDER / "environment.sh").read_text(encoding="utf-8")
    return text.partition("\n\n")[2].strip()


def _options(script: Script) -> list[str]:
    """The #SBATCH lines, without the mark."""
    job = script.job
    gpus = f"{job.gpu_type}:{job.gpus_per_node}" if job.gpu_type else str(job.gpus_per_node)
    options: list[tuple[str, object]] = [
        ("job-name", script.name),
        ("nodes", job.nodes),
        ("ntasks-per-node", job.num_processes_per_node),
        ("gpus-per-node", gpus if job.gpus_per_node else None),
        ("cpus-per-task", script.cpus_per_process),
        ("mem", job.memory),
        ("time", job.time),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("constraint", job.constraint),
        ("reservation", job.reservation),
        ("exclude", job.exclude),
        ("dependency", job.dependency),
        ("signal", f"B:{job.stop_signal}@{job.stop_before}"),
        ("output", _in_directive(script.log)),
        ("chdir", _in_directive(script.directory)),
        ("open-mode", "append"),
    ]
    lines = [f"--{name}={value}" for name, value in options if value is not None]
    if len(script.runs) > 1:
        limit = "" if script.max_parallel is None else f"%{script.max_parallel}"
        lines.append(f"--array=0-{len(script.runs) - 1}{limit}")
    if job.dependency is not None:
        lines.append("--kill-on-invalid-dep=yes")
    if job.exclusive:
        lines.append("--exclusive")
    return [*lines, "--requeue", *job.sbatch]


def _in_directive(path: Path) -> str:
    text = str(path)
    return f'"{text}"' if " " in text else text


def _check_path(path: Path, *, patterns: bool) -> None:
    text = str(path)
    bad = sorted(set(re.findall(r"[\x00-\x1f\"'\\$`]" if patterns else r"[\x00-\x1f\"'\\$`%]", text)))
    if bad:
        raise JobError(
            f"{text}: {', '.join(map(repr, bad))} in a path of the job, which SLURM reads as something else; allowed: "
            "other characters, spaces too"
        )


def _node_checks(job: JobSettings) -> str:
    """Arguments of `preflight node`, as they stand in the script."""
    wanted = job.preflight
    words = [f"--gpus {job.gpus_per_node}"] if job.gpus_per_node else []
    if wanted.min_gpu_memory is not None and job.gpus_per_node:
        words.append(f"--min-gpu-memory {wanted.min_gpu_memory:g}")
    if wanted.min_memory is not None:
        words.append(f"--min-memory {wanted.min_memory:g}")
    if wanted.min_disk:
        words.append(f'--disk "$RUN:{wanted.min_disk:g}"')
    if wanted.command is not None:
        words.append(f"--command {shlex.quote(wanted.command)}")
    return " ".join(words)


def _fabric_checks(job: JobSettings) -> str:
    """Arguments of `preflight fabric` and `pairs`."""
    words = ["--cuda"] if job.gpus_per_node else []  # a torch without CUDA would else pass over gloo
    if job.preflight.min_bandwidth is not None:
        words.append(f"--min-gigabytes {job.preflight.min_bandwidth:g}")
    return " ".join(words)


def _mounts(container: ContainerSettings, script: Script) -> list[str]:
    """The site's mounts, the working directory, and the runs' folders where they lie elsewhere."""
    mounts = [*container.mounts, str(script.directory)]
    mounts += [str(run) for run in script.runs if not run.is_relative_to(script.directory)]
    for mount in mounts:
        if "," in mount:
            raise JobError(f"{mount}: a comma in a path that a container mounts; allowed: paths without commas")
    return list(dict.fromkeys(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts))


def _container_options(container: ContainerSettings, script: Script) -> list[str]:
    """Options of srun, where pyxis starts the container."""
    if container.image is None or container.runtime != "pyxis":
        return []
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(_mounts(container, script))}",
        f"--container-workdir={script.directory}",
    ]


def _container_command(container: ContainerSettings, script: Script) -> list[str]:
    """What stands before the command, where a program starts the container."""
    if container.image is None or container.runtime != "apptainer":
        return []
    gpu = ["--nv"] if script.job.gpus_per_node else []
    binds = ["--bind", ",".join(_mounts(container, script))]
    return ["apptainer", "exec", *gpu, *binds, "--pwd", str(script.directory), container.image]


def misplaced_directives(text: str) -> list[str]:
    """What SLURM would pass over in silence: a sentence for each line that looks like a directive and is none."""
    problems = []
    lines = text.split("\n")
    if not lines[0].startswith("#!"):
        problems.append(f"line 1: {lines[0][:60]!r}; allowed: an interpreter, such as #!/bin/bash")
    if "\r" in text:
        problems.append(
            f"line {text[: text.index(chr(13))].count(chr(10)) + 1}: a carriage return; allowed: Unix line ends"
        )
    command = 0
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            command = command or number
        if not re.match(r"#\s*SBATCH\b", stripped):
            continue
        if command:
            problems.append(
                f"line {number}: {stripped!r} stands after the first command (line {command}): SLURM passes over it"
            )
        elif not line.startswith("#SBATCH"):
            problems.append(f"line {number}: {line!r}: SLURM reads only lines that begin with #SBATCH")
    return problems


def runs_of(text: str) -> list[Path]:
    """Folders of the runs that a script of ours trains.

    Raises:
        JobError: it names none, as only a script of another kind does.
    """
    single = re.search(r"^RUN=(.+)$", text, re.MULTILINE)
    several = re.search(r"^RUNS=\(.*?\n(.*?)^\)$", text, re.MULTILINE | re.DOTALL)
    found = several or single
    if found is None:
        raise JobError("no job of ours: neither RUN= nor RUNS=( is in it; submit it by sbatch")
    return [Path(word) for word in shlex.split(found[1])]
