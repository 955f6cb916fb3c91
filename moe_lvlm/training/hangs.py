"""What a run that hangs leaves under hangs/: each rank's stacks, and a summary of who wrote any and who is silent."""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

_STAMP = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """A rank that makes no progress. seconds: for how long; phase, stage, step: since when (the last finished step)."""

    rank: int
    host: str
    phase: str
    stage: str
    step: int
    seconds: int

    @property
    def place(self) -> str:
        """Where in the run."""
        return f"phase {self.phase}" + (f", stage {self.stage}, after step {self.step}" if self.stage else "")


class HangFolder:
    """The files of one start of a run in its folder hangs/.

    start: when it began, seconds since 1970. limit: of its watchdog, in seconds.
    """

    def __init__(self, folder: Path, *, start: float, limit: float) -> None:
        self._folder = folder
        self._start = int(start)
        self._limit = limit
        self._stamp = datetime.fromtimestamp(start, UTC).strftime(_STAMP)

    @property
    def summary(self) -> Path:
        """Who wrote stacks and who is silent, as JSON."""
        return self._folder / f"{self._stamp}-summary.json"

    @property
    def has_summary(self) -> bool:
        """Whether any rank has written it."""
        return any(map(self._is_ours, self._folder.glob("*-summary.json")))

    def stacks(self, rank: int) -> Path:
        """A rank's last progress, a line a fact, and then the stacks of all its threads."""
        return self._folder / f"{self._stamp}-rank-{rank:03d}.txt"

    def write_stacks(self, hang: Hang) -> None:
        """Write this process's stacks; the file is whole when it has its name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self.stacks(hang.rank)
        partial = path.with_name(f".{path.name}.tmp")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{key}: {value}\n" for key, value in asdict(hang).items())
            file.write("\n")
            file.flush()
            faulthandler.dump_traceback(file)
        partial.replace(path)

    def read(self) -> dict[int, Hang]:
        """The ranks that wrote stacks, by rank."""
        hangs = [_read_hang(path) for path in sorted(self._folder.glob("*-rank-*.txt")) if self._is_ours(path)]
        return {hang.rank: hang for hang in hangs}

    def write_summary(self, hangs: Mapping[int, Hang], hosts: Sequence[str | None]) -> None:
        """Write the summary. hosts: by rank, None where it is not known."""
        silent = [rank for rank in range(len(hosts)) if rank not in hangs]
        values = {
            "start": self._start,
            "limit": self._limit,
            "world_size": len(hosts),
            "dumped": [asdict(hang) for _, hang in sorted(hangs.items())],
            "silent": [{"rank": rank, "host": hosts[rank]} for rank in silent],
        }
        partial = self.summary.with_name(f".{self.summary.name}.{min(hangs)}.tmp")
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.summary)

    def _is_ours(self, path: Path) -> bool:
        # Not by its name: before the ranks have met, each has a start of its own. What an earlier start of the run left
        # was written before this one, what this one leaves about a limit after it.
        return path.stat().st_mtime > self._start + self._limit / 2


def _read_hang(path: Path) -> Hang:
    head, _, _ = path.read_text(encoding="utf-8", errors="replace").partition("\n\n")
    values = dict(line.split(": ", 1) for line in head.split("\n"))
    return Hang(
        rank=int(values["rank"]),
        host=values["host"],
        phase=values["phase"],
        stage=values["stage"],
        step=int(values["step"]),
        seconds=int(values["seconds"]),
    )


def in_words(hangs: Mapping[int, Hang], hosts: Sequence[str | None]) -> str:
    """The summary in a sentence."""
    in_place = sorted(hangs.values(), key=lambda hang: (hang.place, hang.rank))
    parts = [
        f"{_ranks_in_words([hang.rank for hang in found])} in {place}"
        for place, found in groupby(in_place, key=lambda hang: hang.place)
    ]
    silent = sorted(set(range(len(hosts))) - set(hangs), key=lambda rank: (hosts[rank] or "", rank))
    for host, ranks in groupby(silent, key=lambda rank: hosts[rank]):
        where = "" if host is None else f" on {host}"
        parts.append(f"silent (stopped or dead): {_ranks_in_words(list(ranks))}{where}")
    return "; ".join(parts)


def _ranks_in_words(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-5, 7`; in ascending order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"
