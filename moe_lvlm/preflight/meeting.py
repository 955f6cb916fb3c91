"""Where the processes of a check meet: a store in rank 0's process, which outlives what goes wrong in a collective.

Each process works in a thread of its own. Meanwhile the main thread of ranks above 0 says again and again that the
process lives and what it is at, and waits for rank 0's verdict; rank 0 reads this and judges. So a process that hangs,
is stopped or has died is told from one that waits for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_lvlm.preflight.ending import FAILED, complain
from moe_lvlm.preflight.place import Place

# Rank 0 speaks before the others end by themselves: a launcher may end all when one ends badly. Seconds.
LATER = 15.0
_POLL = 0.2  # seconds
_BEAT = 0.5  # seconds
# A process that says nothing for so long, however busy the machine, is not there any more. Seconds.
_SILENCE = 10.0


class NoMeetingError(RuntimeError):
    """The store could not be opened or reached; the message says where."""


class Meeting:
    """The store. limit: seconds to reach it.

    Raises:
        NoMeetingError: it cannot be opened (rank 0) or reached.
    """

    def __init__(self, place: Place, *, limit: float) -> None:
        self._place = place
        self._limit = limit
        self._port = place.port
        try:
            self.store = self._connect(is_server=place.rank == 0)
        except RuntimeError as error:
            raise NoMeetingError(f"{place.master}:{place.port}: {first_line(error)}") from error
        self._port = self.store.port

    @property
    def port(self) -> int:
        """The store's port, also where any free one was asked for."""
        return self._port

    def connect(self) -> dist.TCPStore:
        """A connection of its own, for another thread: one that waits would keep the other waiting."""
        return self._connect(is_server=False)

    def _connect(self, *, is_server: bool) -> dist.TCPStore:
        limit = self._limit if self._place.rank == 0 else self._limit + LATER
        return dist.TCPStore(
            self._place.master,
            self._port,
            self._place.size,
            is_master=is_server,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,
        )

    def read(self, name: str, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
        """What those of the ranks left under a name who did."""
        keys = {rank: f"{name}/{rank}" for rank in ranks}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def gather(
        self, name: str, ranks: Sequence[int], *, limit: float, end: Callable[[set[int]], bool] | None = None
    ) -> dict[int, dict[str, Any]]:
        """Wait until all ranks left their word under a name, until `limit` seconds have passed, or until `end`, given
        the ranks that have not, says so. What was left.
        """
        stop = time.monotonic() + limit
        words = self.read(name, ranks)
        while len(words) < len(ranks) and time.monotonic() < stop:
            if end is not None and end({*ranks} - words.keys()):
                break
            time.sleep(_POLL)
            words |= self.read(name, [rank for rank in ranks if rank not in words])
        return words

    def silent(self, ranks: Sequence[int]) -> set[int]:
        """Those of the ranks above 0 that say nothing any more. Takes some seconds."""
        beats = Beats(self, ranks)
        beats.silent()
        time.sleep(_SILENCE + _BEAT)
        return beats.silent()

    def attend(self, at: Callable[[], str], *, limit: float) -> int:
        """Ranks above 0: say what we are at until rank 0 has judged. The exit status: 0, or 3 for a failure."""
        stop = time.monotonic() + limit
        count = 0
        try:
            while time.monotonic() < stop:
                put(self.store, "beat", self._place.rank, {"count": count, "at": at()})
                if self.store.check(["verdict"]):
                    status = int(self.store.get("verdict"))
                    self.store.add("heard", 1)
                    return status
                count += 1
                time.sleep(_BEAT)
        except RuntimeError as error:
            complain(f"rank 0 is gone: {first_line(error)}")
            return FAILED
        complain(f"no verdict from rank 0 within {limit:.0f} s")
        return FAILED

    def dismiss(self, status: int) -> None:
        """Rank 0: tell the others, and wait until they have heard: the store ends with this process. After a failure
        some may never hear.
        """
        self.store.set("verdict", str(status))
        stop = time.monotonic() + (LATER if status == 0 else 4 * _BEAT)
        while self.store.add("heard", 0) < self._place.size - 1 and time.monotonic() < stop:
            time.sleep(_POLL)


class Beats:
    """Who of the ranks above 0 still speaks."""

    def __init__(self, meeting: Meeting, ranks: Sequence[int]) -> None:
        self._meeting = meeting
        self._ranks = [rank for rank in ranks if rank > 0]
        self._last: dict[int, tuple[float, dict[str, Any] | None]] = {}

    def silent(self) -> set[int]:
        """Those whose word has been the same for too long, as far as it has been looked at before."""
        now = time.monotonic()
        words = self._meeting.read("beat", self._ranks)
        for rank in self._ranks:
            if rank not in self._last or self._last[rank][1] != words.get(rank):
                self._last[rank] = (now, words.get(rank))
        return {rank for rank, (since, _) in self._last.items() if now - since > _SILENCE}


def put(store: dist.TCPStore, name: str, rank: int, word: Mapping[str, Any]) -> None:
    """Leave a rank's word under a name, through any connection."""
    store.set(f"{name}/{rank}", json.dumps(word))


def first_line(error: BaseException) -> str:
    """What an error says, without the C++ stack that torch appends."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
