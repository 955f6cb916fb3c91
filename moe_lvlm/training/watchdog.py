"""A process that makes no progress for too long writes its stacks, names who is silent, and ends."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_lvlm.checkpoint.ranks import Ranks
from moe_lvlm.data.loader import STACKS_SIGNAL
from moe_lvlm.parallel.process_group import host_name
from moe_lvlm.training.folder import HANGS
from moe_lvlm.training.hangs import Hang, HangFolder, in_words

Phase = Literal["start", "load", "step", "save", "close"]

HANG_STATUS = 85
# Seconds from a rank's stacks to the summary. Ranks that wait for each other stopped within less.
GRACE = 4.0
# Seconds after the limit: for a process that cannot even run its watchdog.
_LAST_RESORT = 60.0


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of progress. step: steps done in the stage."""

    phase: Phase
    stage: str = ""
    step: int = 0


class IdleTime:
    """Seconds without a new beat, by looks at intervals of `tick` seconds.

    A longer interval was a stop of the whole process (a suspended job, a sleeping machine) and counts as two ticks.
    """

    def __init__(self, *, tick: float, now: float) -> None:
        self._tick = tick
        self._now = now
        self._beat: Beat | None = None
        self.seconds = 0.0

    def look(self, beat: Beat, *, now: float) -> float:
        """The seconds that the newest beat has been the newest."""
        passed, self._now = min(now - self._now, 2 * self._tick), now
        if beat is self._beat:
            self.seconds += passed
        else:
            self._beat, self.seconds = beat, 0.0
        return self.seconds


class Watchdog:
    """While entered, ends the process with status 85 when no beat has come for `limit` seconds; 0: never.

    Before that it writes stacks into the run's hangs/, those of its data workers to stderr, and says where it hung;
    after a moment the lowest rank that did so says which others did and which are silent. A process whose threads
    cannot run, since one holds on to Python's lock, writes its stacks to stderr a minute later and ends with status 1.
    """

    def __init__(self, folder: Path, *, limit: float) -> None:
        """folder: the run's. Ranks have met nobody yet: the launcher's variables say who they are."""
        self._limit = limit
        self._host = host_name()
        self._rank = int(os.environ.get("RANK", "0"))
        self._hosts: list[str | None] = [None] * int(os.environ.get("WORLD_SIZE", "1"))
        self._path = folder / HANGS
        self._start = time.time()
        self._beat = Beat("start")
        self._is_closed = threading.Event()
        self._log: Callable[..., None] | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._set_last_resort()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_closed.set()
        if self._thread.ident is not None:
            # Ends the process in a moment if it has begun to report: that a peer is gone, which has brought us here, is
            # then no other end than a hang.
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def meet(self, ranks: Ranks) -> list[str]:
        """Agree on the start and on who is where. Every rank calls it once; returns the hosts by rank."""
        met = ranks.all_gather((self._start, self._host))
        hosts = [host for _, host in met]
        self._start, self._hosts = met[0][0], list(hosts)
        self.beat("start")
        return hosts

    def log_to(self, log: Callable[..., None]) -> None:
        """Where an event `hang` goes: to `RunLog.event`."""
        self._log = log

    def beat(self, phase: Phase, *, stage: str = "", step: int = 0) -> None:
        """Progress was made, and what comes now is part of this phase."""
        self._beat = Beat(phase, stage, step)

    def _watch(self) -> None:
        tick = min(0.5, self._limit / 10)
        idle = IdleTime(tick=tick, now=time.monotonic())
        while not self._is_closed.wait(tick):
            self._set_last_resort()
            beat = self._beat
            if idle.look(beat, now=time.monotonic()) >= self._limit:
                self._end(beat, idle.seconds)

    def _set_last_resort(self) -> None:
        # Not at each beat but at each look: it is for a process in which the watchdog does not come to its turn.
        faulthandler.dump_traceback_later(self._limit + _LAST_RESORT, exit=True, file=2)

    def _end(self, beat: Beat, seconds: float) -> None:
        hang = Hang(
            rank=self._rank, host=self._host, phase=beat.phase, stage=beat.stage, step=beat.step, seconds=int(seconds)
        )
        try:
            # On a thread, since what hangs may be the file system that the report goes to.
            reporting = threading.Thread(target=self._report, args=(hang,), name="hang report", daemon=True)
            reporting.start()
            reporting.join(4 * GRACE)
            for child in multiprocessing.active_children():
                child.kill()  # a data worker that hangs does not notice that we are gone
        except Exception as error:
            _say(f"rank {hang.rank}: the report of the hang failed: {error!r}")
        finally:
            os._exit(HANG_STATUS)

    def _report(self, hang: Hang) -> None:
        files = HangFolder(self._path, start=self._start, limit=self._limit)
        stacks = files.stacks(hang.rank)
        _say(
            f"rank {hang.rank} on {hang.host} hangs: no progress for {hang.seconds} s in {hang.place}; stacks: {stacks}"
        )
        _ask_data_workers()
        try:
            files.write_stacks(hang)
        except OSError as error:
            _say(f"{stacks}: not written ({error}); the stacks of rank {hang.rank}:")
            faulthandler.dump_traceback(file=2)
        time.sleep(GRACE)
        hangs = files.read() | {hang.rank: hang}
        if hang.rank > min(hangs):
            # That rank says it. Until it has, this one does not end, since a launcher then ends the others.
            _wait_for(lambda: files.has_summary, GRACE)
            hangs |= files.read()
        if not files.has_summary:
            _say(f"hang after {self._limit:g} s: {in_words(hangs, self._hosts)}")
            try:
                files.write_summary(hangs, self._hosts)
            except OSError as error:
                _say(f"{files.summary}: not written ({error})")
        if self._log is not None:
            silent = [rank for rank in range(len(self._hosts)) if rank not in hangs]
            self._log("hang", phase=hang.phase, stage=hang.stage, step=hang.step, seconds=hang.seconds, silent=silent)


def _ask_data_workers() -> None:
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(child.pid, STACKS_SIGNAL)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.25)


def _say(sentence: str) -> None:
    """To stderr, past Python's buffers: another thread may hang with their lock."""
    os.write(2, f"{sentence}\n".encode())
