"""The ends of large text files, without reading the rest."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 16


def find_last(file: BinaryIO, mark: bytes, *, before: int) -> int | None:
    """The offset of the last line that begins with the mark and begins before an offset; None without one.

    Reads blocks from there backwards.
    """
    end = before - 1  # of the line ends that can stand before such a line
    while end > 0:
        start = max(end - BLOCK, 0)
        file.seek(start)
        found = file.read(end - start + len(mark)).rfind(b"\n" + mark)
        if found >= 0:
            return start + found + 1
        end = start
    file.seek(0)
    return 0 if before > 0 and file.read(len(mark)) == mark else None


def last_lines(file: BinaryIO, count: int, *, start: int, end: int) -> list[bytes]:
    """The last lines between two offsets, without their ends; a line that has no end yet is one. Reads from the end."""
    content = b""
    position = end
    # one end more than lines: that of the line before the first
    while position > start and content.count(b"\n") <= count:
        stop, position = position, max(position - BLOCK, start)
        file.seek(position)
        content = file.read(stop - position) + content
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return lines[-count:]


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if it is not there (any more)."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def readable(line: bytes) -> str:
    """A line as it would stand on a terminal: of a progress bar the last state."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")
