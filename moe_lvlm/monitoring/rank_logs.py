"""What the ranks of SLURM jobs printed: a file a rank, in it a section an attempt; and the logs of batch scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lvlm.monitoring.attempts import Attempt
from moe_lvlm.monitoring.folder import RANK_LOGS, SLURM
from moe_lvlm.monitoring.spans import names
from moe_lvlm.monitoring.tail import find_last, last_lines

_MARK = b"=== attempt "
_HEADER = re.compile(rb"=== attempt (\d+), job ([^,\n]*), rank (\d+) on ([^,\n]*), ")
_RANK_FILE = re.compile(r"rank-(\d+)\.log")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a rank's log: of one attempt, or of no known one where the file has no header (attempt None, node "").
    start, end: offsets."""

    path: Path
    rank: int
    attempt: int | None
    node: str
    start: int
    end: int

    def last_lines(self, count: int) -> list[bytes]:
        """The last ones, the oldest first."""
        with self.path.open("rb") as file:
            return last_lines(file, count, start=self.start, end=self.end)


def rank_files(run: Path) -> dict[int, Path]:
    """The log of each rank that has one, by rank."""
    found = {path: _RANK_FILE.fullmatch(path.name) for path in (run / RANK_LOGS).glob("rank-*.log")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def job_files(run: Path, attempts: Sequence[Attempt]) -> dict[str, Path]:
    """The log of each batch script, by job; the one that was written last comes last.

    Those of a sweep's jobs, of which `attempts` knows, lie beside its runs.
    """
    found = list((run / SLURM).glob("job-*.log"))
    jobs = sorted({one.job for one in attempts if "_" in one.job})
    found += [path for job in jobs if (path := run.resolve().parent / f"job-{job}.log").is_file()]
    found.sort(key=lambda path: path.stat().st_mtime)
    return {path.name.removeprefix("job-").removesuffix(".log"): path for path in found}


def find_section(path: Path, rank: int, attempt: int | None) -> Section | None:
    """The section of an attempt, or of the newest (None). Found from the file's end; None if there is none."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        begin = find_last(file, _MARK, before=end)
        if begin is None:
            return Section(path, rank, None, "", 0, end) if attempt is None else None
        while begin is not None:
            file.seek(begin)
            header = _HEADER.match(file.readline(1000))
            if header is not None and attempt in (None, int(header[1])):
                node = header[4].decode("utf-8", "replace")
                return Section(path, rank, int(header[1]), node, begin, end)
            if header is not None:
                end = begin
            begin = find_last(file, _MARK, before=begin)
    return None


def choose_sections(run: Path, *, rank: int | None, attempt: int | None) -> list[Section]:
    """One rank's section, or those of all (None), in order; of an attempt, or of the newest of these ranks (None).

    Raises:
        ValueError: there are no logs, no such rank, or no such attempt; it says what there is.
    """
    files = rank_files(run)
    if not files:
        raise ValueError(
            f"{run / RANK_LOGS}: no rank-000.log or other; the ranks of jobs of `moe-lvlm submit` write there, once training "
            "begins (`--job`: the log of the batch script). A run started otherwise says all in its own terminal"
        )
    if rank is not None and rank not in files:
        raise ValueError(f"{run / RANK_LOGS}: no log of rank {rank}; there are those of ranks {ranges(list(files))}")
    chosen = {one: path for one, path in files.items() if rank in (None, one)}
    sections = [section for one, path in chosen.items() if (section := find_section(path, one, attempt)) is not None]
    if not sections:
        where = f"{run / RANK_LOGS}" if rank is None else f"{files[rank]}"
        there = sorted({number for path in chosen.values() for number in _attempts_in(path)})
        raise ValueError(f"{where}: nothing of attempt {attempt}; there are attempts {ranges(there) or '(none)'}")
    newest = max(-1 if section.attempt is None else section.attempt for section in sections)
    return [section for section in sections if section.attempt in (None, newest)]


def choose_job_file(run: Path, attempts: Sequence[Attempt], attempt: int | None) -> Path:
    """The batch script's log of the job that made an attempt, or that was written last (None).

    Raises:
        ValueError: there is none; it says what there is.
    """
    files = job_files(run, attempts)
    if not files:
        raise ValueError(
            f"{run / SLURM}: no log of a job (job-17.log); jobs of `moe-lvlm submit` write it once they run"
        )
    if attempt is None:
        return list(files.values())[-1]
    jobs = {one.number: one.job for one in attempts if one.number is not None}
    if attempt not in jobs:
        raise ValueError(f"{run}: no attempt {attempt}; there are attempts {ranges(sorted(jobs)) or '(none)'}")
    if jobs[attempt] not in files:
        raise ValueError(
            f"{run / SLURM}: no job-{jobs[attempt]}.log, of attempt {attempt}; there are logs of jobs {names(list(files))}"
        )
    return files[jobs[attempt]]


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, such as 0-2, 4, 6-7."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = parts[-1][0], number
        else:
            parts.append((number, number))
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)


def _attempts_in(path: Path) -> list[int]:
    found = []
    with path.open("rb") as file:
        begin = find_last(file, _MARK, before=file.seek(0, 2))
        while begin is not None:
            file.seek(begin)
            header = _HEADER.match(file.readline(1000))
            found += [int(header[1])] if header else []
            begin = find_last(file, _MARK, before=begin)
    return found
