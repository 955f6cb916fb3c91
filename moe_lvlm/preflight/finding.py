"""What checks found, as a table for people and as lines for a job's script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_LONGEST = 300  # characters of a reason: it ends up in scontrol's and the job log's lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. value: what is there. asked: what was asked for, "" if nothing was. problem: a sentence, None when all
    is well. facts: for scripts, by key.
    """

    name: str
    value: str
    asked: str = ""
    problem: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def one_line(text: str) -> str:
    """Text without line ends and control characters, cut where it is long."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def bad_line(node: str, reason: str) -> str:
    """The line that names a bad node."""
    return f"{node} bad {one_line(reason)}"


def node_lines(node: str, findings: Sequence[Finding]) -> list[str]:
    """`NODE ok KEY=VALUE ...`, or `NODE bad REASON` for each problem."""
    problems = [finding.problem for finding in findings if finding.problem is not None]
    if problems:
        return [bad_line(node, problem) for problem in problems]
    facts = {key: value for finding in findings for key, value in finding.facts.items()}
    return [" ".join([node, "ok", *(f"{key}={'_'.join(value.split())}" for key, value in facts.items())])]


def table(findings: Sequence[Finding]) -> str:
    """Columns of text. Made by hand: where packages are broken, which is what is looked for, rich may be too."""
    rows = [("check", "found", "asked for", "")]
    for finding in findings:
        verdict = "ok" if finding.problem is None else f"BAD: {one_line(finding.problem)}"
        rows.append((finding.name, one_line(finding.value), one_line(finding.asked), verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )
