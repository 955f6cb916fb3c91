"""Files that grow, as they grow: lines of all of them in the order in which they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_lvlm.monitoring.folder import DONE
from moe_lvlm.monitoring.tail import readable, size_of

_PAUSE = 0.5
_MOST_BYTES = 1 << 20
"""Of one file at a time, so that a file with much in it does not keep the others waiting."""


@dataclass(slots=True)
class _Growing:
    """offset: up to where it was read. rest: the beginning of a line without its end."""

    offset: int
    rest: bytes = b""

    def read(self, path: Path) -> list[bytes]:
        """Whole lines that came since."""
        size = size_of(path)
        if size < self.offset:  # begun anew
            self.offset, self.rest = 0, b""
        if size == self.offset:
            return []
        with path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(_MOST_BYTES)
        self.offset += len(content)
        *lines, self.rest = (self.rest + content).split(b"\n")
        return lines


def follow(
    run: Path,
    find: Callable[[], Mapping[Path, str]],
    write: Callable[[str, str], None],
    *,
    offsets: Mapping[Path, int],
    pause: Callable[[], None] = lambda: time.sleep(_PAUSE),
) -> None:
    """Give each new line to `write`, with its file's label, until the run is done and everything was read.

    find: the files to follow with their labels, asked again each time. offsets: where to begin in files that are known;
    files that come later are read from their beginning.
    """
    growing = {path: _Growing(offset) for path, offset in offsets.items()}
    while True:
        is_done = (run / DONE).exists()  # asked first: what is written before the mark is read below
        has_news = False
        files = find()
        for path, label in files.items():
            for line in growing.setdefault(path, _Growing(0)).read(path):
                write(label, readable(line))
                has_news = True
        if is_done and not has_news:
            for path, label in files.items():
                if growing[path].rest:
                    write(label, readable(growing[path].rest))
            return
        pause()
