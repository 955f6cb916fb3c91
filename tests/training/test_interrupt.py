"""Signals only ask for a stop, and nobody who is needed for it dies of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_lvlm.data import loader
from moe_lvlm.data.order import StepOrder
from moe_lvlm.training.interrupt import Interrupt
from tests.training.launching import ROOT, TIME_LIMIT, Server, events

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def state() -> tuple[dict[signal.Signals, Any], set[int]]:
    """Who handles signals now, and which are blocked."""
    return {one: signal.getsignal(one) for one in ALL}, signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_is_noted(number: signal.Signals) -> None:
    before = state()
    stop_signal = number if number.name.startswith("SIGUSR") else None
    with Interrupt(stop_signal) as interrupt:
        assert not interrupt.is_requested
        os.kill(os.getpid(), number)
        assert interrupt.is_requested
        for again in (signal.SIGTERM, *([stop_signal] if stop_signal else [])):
            os.kill(os.getpid(), again)
        assert interrupt.is_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert state() == before


def test_a_stop_signal_that_nobody_looked_at_is_gone_afterwards() -> None:
    """It would end this process."""
    with Interrupt(signal.SIGUSR1):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.sigpending() == set()


def test_a_thread_that_ran_before_may_get_it() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        with Interrupt(signal.SIGUSR1) as interrupt:
            assert thread.ident is not None
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
            limit = time.monotonic() + TIME_LIMIT
            while not interrupt.is_requested and time.monotonic() < limit:
                time.sleep(0.01)
            assert interrupt.is_requested
    finally:
        go.set()
        thread.join()


def test_programs_that_are_started_meanwhile_survive_it() -> None:
    with Interrupt(signal.SIGUSR2):
        result = subprocess.run(["sh", "-c", "kill -USR2 $$; echo alive"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "alive\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGCHLD])
def test_other_stop_signals_are_refused(number: signal.Signals) -> None:
    with pytest.raises(ValueError, match=rf"stop_signal: .*{number.name}.*; allowed: SIGUSR1, SIGUSR2"):
        Interrupt(number)


class _Numbers:
    def __getitem__(self, draw: Any) -> Any:
        for number in ALL:
            os.kill(os.getpid(), number)
        return draw.position


def _collate(samples: Sequence[Any]) -> Any:
    return list(samples)


def test_data_workers_ignore_signals_from_their_first_moment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every signal comes before a worker had time to say that it ignores it, and again while it reads."""
    ignore = loader._ignore_interrupts

    def late(worker: int) -> None:
        for number in ALL:
            os.kill(os.getpid(), number)
        ignore(worker)

    monkeypatch.setattr(loader, "_ignore_interrupts", late)
    before = state()
    order = StepOrder(seed=4, epoch_size=12, micro_batch=2, global_batch=4)
    steps = loader.StepLoader(_Numbers(), order, _collate, num_workers=2).steps(0, 3)
    seen = [place for step in steps for micro_batch in step for place in micro_batch.batch]
    assert sorted(seen) == list(range(12))
    assert state() == before


@pytest.mark.distributed
def test_asked_from_the_first_moment_to_the_last(server: Server, recipe: Path, tmp_path: Path) -> None:
    """As a batch job does: the signal is ignored before the program begins, and then sent again and again, through
    imports, training and the end of the process."""
    run = tmp_path / "run"
    command = ["train", str(recipe), f"output_dir={run}", "--stop-signal", "USR1"]
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-c", 'trap "" USR1; exec "$@"', "_", sys.executable, "-m", "moe_lvlm", *command],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            # the shell needs a moment until it ignores it
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        )
        limit = time.monotonic() + TIME_LIMIT
        while process.poll() is None and time.monotonic() < limit:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        process.kill()
        assert process.wait() == 0, (tmp_path / "output.txt").read_text()
    assert not (run / "DONE").exists()
    assert events(run).named("step") == []
    assert [Path(line["path"]).name for line in events(run).named("stopped")] == ["tune-000000"]
    server.run(command, world=1)
    assert (run / "DONE").exists()
