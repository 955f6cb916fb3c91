"""Saving beside training: the second half of a save on a thread, out of a copy in host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from moe_lvlm.checkpoint.folder import Log
from moe_lvlm.checkpoint.ranks import Ranks, SaveError
from moe_lvlm.checkpoint.save import PreparedSave, SaveReport, finish_save

Done = Callable[[SaveReport], None]


class CheckpointWriter:
    """Finishes the saves of a run, one at a time: on a thread, or at once. Every rank has one and calls it alike.

    background_ranks: a group of its own, since its collectives run beside those of training; None: always at once.
    max_bytes: the most that any rank may copy to host memory. A larger save is written at once, with a line in the log.
    """

    def __init__(self, *, ranks: Ranks, background_ranks: Ranks | None, max_bytes: int, log: Log) -> None:
        self._ranks = ranks
        self._background_ranks = background_ranks
        self._max_bytes = max_bytes
        self._log = log
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def finish(
        self, prepared: PreparedSave, *, at_once: bool, keep_last: int | None, protect: Collection[str], done: Done
    ) -> None:
        """Write a prepared save; `done` is called with its report, on the thread that wrote it.

        at_once: return when it is there. Otherwise an error is raised by the next call of `finish` or `wait`.
        """
        self.wait()
        if at_once or self._background_ranks is None or not self._fits(prepared):
            done(finish_save(prepared, ranks=self._ranks, log=self._log, keep_last=keep_last, protect=protect))
            return
        copied, ranks = prepared.copy_to_host(), self._background_ranks

        def work() -> None:
            try:
                done(finish_save(copied, ranks=ranks, log=self._log, keep_last=keep_last, protect=protect))
            except BaseException as error:  # raised by `wait`, on the thread that trains
                self._error = error

        # A daemon: a rank that fails must end at once, as if it had been killed, and not wait here for the others.
        self._thread = threading.Thread(target=work, name=f"save {prepared.name}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way, if there is one. Raises SaveError if it failed, as on all ranks."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, SaveError):
            raise SaveError(str(error)) from error
        if error is not None:
            raise error

    def _fits(self, prepared: PreparedSave) -> bool:
        largest = max(prepared.loads)
        if largest > self._max_bytes:
            self._log(
                f"{prepared.name}: a rank's share is {largest:,} bytes, train.checkpoint.background_gib allows "
                f"{self._max_bytes:,}: training waits while it is written"
            )
        return largest <= self._max_bytes
