"""Two runs in one folder, and a disk that is full."""

from __future__ import annotations

import signal
from pathlib import Path

from torturing.disk import fill, make_room, small_disk
from torturing.jobs import Job
from torturing.kills import Say
from torturing.runs import TIME_LIMIT, Bench, Victim
from torturing.strike import Strike
from torturing.tally import Tally

DISK_BYTES = 96 * 2**20
LITTLE = 4 * 2**20  # less than a save asks for before it begins
TRIES = 5


def second_runs(bench: Bench, tally: Tally, times: int, say: Say) -> None:
    """Start a second run in the folder of one that trains: it is refused, and the first one does not notice."""
    for number in range(times):
        victim = bench.victim(f"shared-{number}")
        first = victim.start()
        victim.reach(first, victim.has_stepped)
        first.signal(signal.SIGSTOP)  # so that it does not end before the second one gets there
        for options in ([], ["--fresh"]):
            second = bench.server.start([*victim.command, *options], world=bench.topology.world)
            if not second.wait(seconds=TIME_LIMIT):
                second.kill()
            say(f"a second run{' with ' + options[0] if options else ''}: {second.statuses()}")
            if not all(status and status > 0 for status in second.statuses()):
                victim.complain("wrong", f"a second run {options} was not refused: {second.statuses()}")
            elif str(victim.folder) not in second.output:
                victim.complain("wrong", f"a second run {options} does not name the folder:\n{second.output[-2000:]}")
        first.signal(signal.SIGCONT)
        victim.settle(first)
        if any(first.statuses()) or not victim.is_done:
            victim.complain("lost", f"a second run disturbed the first one:\n{first.output[-2000:]}")
        tally.add("a second run in the folder", victim.take_problems())
        victim.discard()


def fill_disks(bench: Bench, tally: Tally, times: int, say: Say) -> None:
    """Let saves fail for want of room: the run ends and says why, what was saved stays, and with room it goes on."""
    for number in range(times):
        disk = bench.folder / f"disk-{number}"
        with small_disk(disk, DISK_BYTES) as problem:
            if problem is not None:
                tally.notes.append(f"no tmpfs ({problem}): full disks were tried as writes that fail (EFBIG) only")
            else:
                _fill_one(bench, tally, disk, say)
        _refuse_writes(bench, tally, number, say)


def _fill_one(bench: Bench, tally: Tally, disk: Path, say: Say) -> None:
    victim = bench.victim("run", inside=disk)
    for name, leave in (("little room on the disk (tmpfs)", LITTLE), ("a full disk (tmpfs)", 0)):
        job = victim.start()
        victim.reach(job, victim.has_stepped)
        job.signal(signal.SIGSTOP)  # so that it does not end before the disk is full
        fill(disk, leave=leave)
        job.signal(signal.SIGCONT)
        victim.settle(job)
        say(f"{name}: {job.statuses()}")
        _check_clear_end(victim, job, ("No space left on device", "bytes free"))
        make_room(disk)
        tally.add(name, victim.take_problems())
    victim.finish()
    tally.add(name, victim.take_problems(), hit=0)


def _refuse_writes(bench: Bench, tally: Tally, number: int, say: Say) -> None:
    """A rank may write no large file any more, from some change of the folder on."""
    name = "a write that fails (EFBIG)"
    victim = bench.victim(f"refused-{number}")
    for _ in range(TRIES):
        rank = bench.rng.randrange(bench.topology.world)
        strike = Strike(
            kind="refuse",
            rank=rank,
            number=bench.rng.randint(1, max(1, bench.changes[rank] // 2)),
            bytes=bench.rng.randint(2**15, 2**16),
            folder=f"{victim.folder}/",
        )
        job = victim.start(strike)
        victim.settle(job)
        if not victim.is_done:
            say(f"{name}: {job.statuses()}")
            _check_clear_end(victim, job, ("File too large",))
            tally.add(name, victim.take_problems())
            break
    if not victim.is_done:
        victim.finish()
    tally.add(name, victim.take_problems(), hit=0)
    victim.discard()


def _check_clear_end(victim: Victim, job: Job, reasons: tuple[str, ...]) -> None:
    """All ranks ended by themselves, not well, and the reason was said."""
    if not all(status and status > 0 for status in job.statuses()):
        victim.complain("wrong", f"could not save, and ended with {job.statuses()}:\n{job.output[-2000:]}")
    elif not any(reason in job.output for reason in reasons):
        victim.complain("wrong", f"could not save, and does not say {' or '.join(reasons)}:\n{job.output[-2000:]}")
