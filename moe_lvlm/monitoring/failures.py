"""What the ranks of a failed attempt said last: a traceback, or lines that tell of an error; ranks that said the same
together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_lvlm.monitoring.rank_logs import Section
from moe_lvlm.monitoring.tail import readable

_NUM_LINES_READ = 4000
_MOST_LINES, _MOST_ERROR_LINES, _MESSAGE_LINES = 100, 10, 8
_PREFIX = re.compile(r"^\[rank\d+\]:\s?")  # of torch's own hook
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_ERROR = re.compile(
    r"\b(\w*error|fatal|critical|\w*exception|aborted|killed|hangs?|segmentation fault|out of memory|failed)\b",
    re.IGNORECASE,
)
# What differs between ranks that say the same.
_OWN = re.compile(
    r"0x[0-9a-f]+|(?<=\brank)[ :=]?\d+|(?<=\bcuda:)\d+|(?<=\bgpu )\d+|(?<=\bpid )\d+|(?<=:)\d{4,5}\b"
    r"|\b\d+(?:\.\d+){3}\b|\d{4}-\d\d-\d\d[T ][\d:.,]+Z?|\b\d\d:\d\d:\d\d(?:[.,]\d+)?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Failure:
    """What one rank said last. lines: a traceback, or error lines; only its very last line if has_error is false."""

    section: Section
    lines: tuple[str, ...]
    has_error: bool

    @property
    def key(self) -> str:
        """The same for ranks that said the same, their own numbers apart."""
        return _OWN.sub("#", "\n".join(self.lines).replace(self.section.node or "\0", "#"))


def read_failure(section: Section) -> Failure:
    """Look into the last lines of a section."""
    lines = [_PREFIX.sub("", readable(line)) for line in section.last_lines(_NUM_LINES_READ)]
    if lines and lines[0].startswith("=== attempt "):
        lines = lines[1:]
    found = _last_traceback(lines) or [line for line in lines if _ERROR.search(line)][-_MOST_ERROR_LINES:]
    if found:
        return Failure(section, tuple(found[-_MOST_LINES:]), True)
    return Failure(section, tuple([line for line in lines if line.strip()][-1:]), False)


def group_failures(failures: Sequence[Failure], *, first: int | None) -> list[list[Failure]]:
    """Together those who said the same; the rank `first` leads, then ranks with an error, then the others."""
    groups: dict[str, list[Failure]] = {}
    for failure in sorted(failures, key=lambda one: (one.section.rank != first, not one.has_error, one.section.rank)):
        groups.setdefault(failure.key, []).append(failure)
    return list(groups.values())


def _last_traceback(lines: Sequence[str]) -> list[str]:
    """The last one with those that it came from; empty without one."""
    starts = [place for place, line in enumerate(lines) if line.endswith(_TRACEBACK)]
    if not starts:
        return []
    end = starts[-1] + 1
    while end < len(lines) and (not lines[end] or lines[end][0].isspace()):
        end += 1
    end = min(end + 1, len(lines))  # the exception
    end += sum(1 for _ in _message_lines(lines[end : end + _MESSAGE_LINES]))
    start = starts.pop()
    while starts and any(phrase in line for line in lines[max(start - 3, 0) : start] for phrase in _CHAINED):
        start = starts.pop()
    return list(lines[start:end])


def _message_lines(lines: Sequence[str]) -> Iterator[str]:
    """The further lines of an exception's message, as far as can be told: up to an empty one."""
    for line in lines:
        if not line.strip() or line.startswith("=== "):
            return
        yield line
