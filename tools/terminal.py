"""What the scripts of this folder share: how they end, and how they show progress."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
# What a user can cause and mend. Anything else is ours and keeps its traceback.
_USER_ERRORS = (ValueError, OSError)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, as it stands there."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(work: Callable[[], int]) -> int:
    """Do a script's work; the exit status: its own, 2 for a user's mistake, 130 when interrupted."""
    try:
        return work()
    except KeyboardInterrupt:
        print("interrupted; nothing was left half done", file=sys.stderr)
        return INTERRUPTED
    except _USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for bytes written; gives the function to tell of each so many bytes."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda num_bytes: progress.update(task, advance=num_bytes)


def parse_bytes(text: str) -> int:
    """An argument such as 5GB, 500MiB or 1000000, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a size above 0 such as 5GB, 500MiB or 1000000")
    return int(float(found[1]) * _UNITS[found[2]])
