"""What happened, counted by fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torturing.judge import Problem

KINDS = ("lost", "wrong", "different")


@dataclass
class Row:
    """One sort of fault. hit: times that it came to pass. moments: what the run was doing then."""

    hit: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(problem.kind == kind for problem in self.problems)


@dataclass
class Tally:
    """rows: by the fault's name, in the order in which faults came. notes: what could not be tried, and why."""

    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, fault: str, problems: Collection[Problem], *, hit: int = 1, moment: str | None = None) -> None:
        """hit: 0 for what was found when no fault came to pass, as at the end of a run."""
        if not hit and not problems:
            return
        row = self.rows.setdefault(fault, Row())
        row.hit += hit
        row.problems += problems
        if moment is not None:
            row.moments[moment] += 1

    @property
    def is_good(self) -> bool:
        return not any(row.problems for row in self.rows.values())

    def table(self) -> str:
        """Markdown."""
        lines = [
            "| fault | times | at the start / in training / in a save | lost | wrong resumes | different |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in self.rows.items():
            moments = " / ".join(str(row.moments[one]) for one in ("start", "training", "saving"))
            counts = " | ".join(str(row.count(kind)) for kind in KINDS)
            lines.append(f"| {name} | {row.hit} | {moments if row.moments else '-'} | {counts} |")
        total = " | ".join(str(sum(row.count(kind) for row in self.rows.values())) for kind in KINDS)
        lines.append(f"| all | {sum(row.hit for row in self.rows.values())} | | {total} |")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "faults": {
                name: {
                    "times": row.hit,
                    "moments": dict(row.moments),
                    **{kind: row.count(kind) for kind in KINDS},
                    "problems": [f"{problem.kind}: {problem.text}" for problem in row.problems],
                }
                for name, row in self.rows.items()
            },
            "notes": self.notes,
            "is_good": self.is_good,
        }
