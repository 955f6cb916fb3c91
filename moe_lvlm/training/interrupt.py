"""Ctrl-C, SIGTERM and a batch system's signal: ask the loop to save and leave at the next step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupt:
    """While entered, SIGINT, SIGTERM and the stop signal only set `is_requested`; a second SIGINT interrupts at once.

    stop_signal: what a batch system sends some time before the end, SIGUSR1 or SIGUSR2, and to every process of the
    job. It is blocked, and looked up when somebody asks: unlike a handler that also holds for the threads and programs
    that are started meanwhile (a compiler, say), which it would end.

    Raises:
        ValueError: a stop signal that is none of STOP_SIGNALS.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, stop_signal: signal.Signals | None = None) -> None:
        if stop_signal not in (None, *STOP_SIGNALS):
            raise ValueError(f"stop_signal: {stop_signal!r}; allowed: {', '.join(one.name for one in STOP_SIGNALS)}")
        self._stop = set() if stop_signal is None else {stop_signal}
        self._is_requested = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._mask: set[int] = set()

    @property
    def is_requested(self) -> bool:
        """Whether somebody has asked for a stop."""
        return self._is_requested or not self._stop.isdisjoint(signal.sigpending())

    def __enter__(self) -> Interrupt:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._stop)
        # The handler is for a stop signal too: a thread that ran before does not block it.
        self._handlers = {number: signal.signal(number, self._handle) for number in (*self.SIGNALS, *self._stop)}
        return self

    def __exit__(self, *exception: object) -> None:
        while self._stop and signal.sigtimedwait(self._stop, 0) is not None:
            continue  # one that still waits would reach whoever was there before
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._is_requested = True
