"""What `moe-lvlm logs` prints."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from moe_lvlm.monitoring.attempts import RUNNING, Attempt, job_attempts
from moe_lvlm.monitoring.failures import Failure, group_failures, read_failure
from moe_lvlm.monitoring.folder import EVENTS, RANK_LOGS, SLURM
from moe_lvlm.monitoring.follow import follow
from moe_lvlm.monitoring.rank_logs import choose_job_file, choose_sections, find_section, job_files, ranges, rank_files
from moe_lvlm.monitoring.records import read_events
from moe_lvlm.monitoring.tail import last_lines, readable, size_of

_NO_FAILURES = (RUNNING, "done", "stopped", "cancelled")


def print_ranks(
    run: Path, *, rank: int | None, attempt: int | None, lines: int, is_followed: bool, file: TextIO
) -> None:
    """The last lines of a rank, or of each (None, every line with its rank), of an attempt or the newest (None).

    is_followed: go on with what is added, also by ranks that begin later. Without, what is missing is a ValueError.
    """

    def find() -> dict[Path, str]:
        files = rank_files(run)
        width = len(str(max(files, default=0)))
        if rank is None:
            return {path: f"rank {one:{width}}| " for one, path in files.items()}
        return {path: "" for one, path in files.items() if one == rank}

    write = _writer(file)
    offsets: dict[Path, int] = {}
    if find() or not is_followed:
        sections = choose_sections(run, rank=rank, attempt=attempt)
        labels = find()
        for section in sections:
            for line in section.last_lines(lines):
                write(labels[section.path], readable(line))
        ends = {section.path: section.end for section in sections}
        offsets = {path: ends.get(path, size_of(path)) for path in labels}
    if is_followed:
        _say_waiting(offsets, run / RANK_LOGS, file)
        follow(run, find, write, offsets=offsets)


def print_job(run: Path, *, attempt: int | None, lines: int, is_followed: bool, file: TextIO) -> None:
    """The last lines of the batch script of an attempt, or of the newest job (None). is_followed: of later jobs too."""

    def find() -> dict[Path, str]:
        return dict.fromkeys(job_files(run, _attempts(run)).values(), "")

    write = _writer(file)
    offsets: dict[Path, int] = {}
    if find() or not is_followed:
        path = choose_job_file(run, _attempts(run), attempt)
        end = size_of(path)
        with path.open("rb") as log:
            for line in last_lines(log, lines, start=0, end=end):
                write("", readable(line))
        offsets = {other: size_of(other) for other in find()} | {path: end}
    if is_followed:
        _say_waiting(offsets, run / SLURM, file)
        follow(run, find, write, offsets=offsets)


def print_errors(run: Path, *, attempt: int | None, file: TextIO) -> None:
    """What each rank of an attempt, or of the newest one that failed (None), said of an error."""
    attempts = _attempts(run)
    failed = [one for one in attempts if one.outcome not in _NO_FAILURES]
    if attempt is None and attempts and not failed:
        print(f"no attempt of {run} has failed", file=file)
        return
    number = attempt if attempt is not None or not failed else failed[-1].number
    about = next((one for one in attempts if one.number == number), None)
    if about is not None:
        cause = f": {about.cause}" if about.cause else ""
        print(f"attempt {about.number}, job {about.job}: {about.outcome}{cause}", file=file)
    if about is not None and not any(find_section(path, rank, number) for rank, path in rank_files(run).items()):
        print(
            f"its ranks said nothing; `moe-lvlm logs {shlex.quote(str(run))} --job` shows what the job did", file=file
        )
        return
    sections = choose_sections(run, rank=None, attempt=number)
    first = None if about is None else about.rank
    for group in group_failures([read_failure(section) for section in sections], first=first):
        _print_group(group, first=first, file=file)


def _print_group(group: Sequence[Failure], *, first: int | None, file: TextIO) -> None:
    leader, others = group[0], sorted(failure.section.rank for failure in group[1:])
    section = leader.section
    where = f"rank {section.rank}" + (f" on {section.node}" if section.node else "")
    named = ", the cause" if section.rank == first else ""
    print(f"\n{where}{named}:{'' if leader.has_error else ' no error; its last line:'}", file=file)
    print("\n".join(f"  {line}" for line in leader.lines or ("(nothing)",)), file=file)
    if others:
        print(f"rank{'s' if len(others) > 1 else ''} {ranges(others)}: the same", file=file)


def _attempts(run: Path) -> list[Attempt]:
    return job_attempts(read_events(run / EVENTS)[0])


def _writer(file: TextIO) -> Callable[[str, str], None]:
    def write(label: str, line: str) -> None:
        print(f"{label}{line}", file=file, flush=True)

    return write


def _say_waiting(offsets: dict[Path, int], folder: Path, file: TextIO) -> None:
    if not offsets:
        print(f"(nothing in {folder} yet; waiting)", file=file, flush=True)
