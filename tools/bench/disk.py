"""What reading and writing cost here, and what a piece of work costs beside it: time, memory, bytes written."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

CHUNK = 16 * 2**20
_SAMPLE_SECONDS = 0.004


@dataclass(frozen=True, slots=True)
class Cost:
    """seconds: of the wall. peak_bytes: anonymous memory above what was there before. written_bytes: handed to write
    calls."""

    seconds: float
    peak_bytes: int
    written_bytes: int


def files_of(path: Path) -> list[Path]:
    """All files of a folder, in a fixed order."""
    return sorted(file for file in path.rglob("*") if file.is_file())


def drop_from_cache(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the files' pages, so that reading them means reading the disk. They must be synced."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def settle() -> None:
    """Wait until the disk has done what earlier work left it: what was removed is discarded when the journal commits,
    and whoever syncs next would pay for it."""
    os.sync()


def read_seconds(files: Sequence[Path]) -> float:
    """Seconds to read the files one after the other with plain reads, from a cache that was asked to forget them."""
    drop_from_cache(files)
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start


def write_seconds(path: Path, num_bytes: int, data: bytes) -> float:
    """Seconds to write so many bytes to one new file and fsync it; the file is removed. data: repeated as needed."""
    start = time.perf_counter()
    with path.open("xb", buffering=0) as file:
        left = num_bytes
        while left > 0:
            left -= file.write(memoryview(data)[: min(left, len(data))])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


class MemoryWatch:
    """A process of its own that watches the anonymous memory of this one, so that watching costs the work nothing."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_watch, args=(os.getpid(), there), daemon=True)
        self._process.start()
        there.close()

    def measure(self, work: Callable[[], object]) -> Cost:
        """Do the work. Before it, what is free is given back to the system, so that all it takes is seen."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._pipe.send("begin")
        before = self._pipe.recv()
        written, start = _written_bytes(), time.perf_counter()
        work()
        seconds, written = time.perf_counter() - start, _written_bytes() - written
        self._pipe.send("end")
        return Cost(seconds, self._pipe.recv() - before, written)

    def close(self) -> None:
        """End the watching process."""
        self._pipe.close()
        self._process.join()


def _watch(pid: int, pipe: Connection) -> None:
    """Answer each "begin" with the memory then, each "end" with the peak since."""
    try:
        while True:
            pipe.recv()
            peak = anonymous_bytes(pid)
            pipe.send(peak)
            while not pipe.poll(_SAMPLE_SECONDS):
                peak = max(peak, anonymous_bytes(pid))
            pipe.recv()
            pipe.send(peak)
    except EOFError:  # closed
        return


def anonymous_bytes(pid: int | None) -> int:
    """Resident anonymous memory of a process; 0 if it has ended. Linux."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


def _written_bytes() -> int:
    text = Path("/proc/self/io").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("wchar"))
