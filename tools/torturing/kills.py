"""SIGKILL at any moment, and the signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection

from moe_lvlm.training.interrupt import Interrupt
from torturing.jobs import Job
from torturing.judge import find_checkpoints, read_log
from torturing.runs import TIME_LIMIT, Bench, Victim
from torturing.strike import Kind, Strike
from torturing.tally import Tally

Say = Callable[[str], None]
KILLED = {-signal.SIGKILL, -signal.SIGXFSZ}
ASKED = {-signal.SIGTERM, -signal.SIGINT, 130}  # ended by such a signal; 130: and said so
EARLY, EARLY_SHARE = 12, 0.3  # changes that a start makes; torn writes that are to hit one of their small documents
MAX_FAILURES = 3  # runs that end by themselves, after which there is no point in going on


def kill_runs(bench: Bench, tally: Tally, kills: int, say: Say) -> None:
    """Kill a run again and again, and start it with the same command each time, until it is done; then the next one."""
    hits, runs, failures = 0, 0, 0
    victim = bench.victim("killed-0")
    while hits < kills and failures < MAX_FAILURES:
        name, moment = _kill_once(bench, victim)
        if moment is not None:
            hits += 1
            say(f"{hits}/{kills} {name}, {moment}")
        tally.add(name, victim.take_problems(), hit=int(moment is not None), moment=moment)
        if victim.is_done or moment is None:
            failures += not victim.is_done
            runs += 1
            victim.discard()
            victim = bench.victim(f"killed-{runs}")
    if hits < kills:
        tally.notes.append(f"only {hits} of {kills} kills: {failures} runs did not go on")
    elif victim.num_starts:  # begun, and not done yet
        victim.finish()
        tally.add(name, victim.take_problems(), hit=0)
        victim.discard()


def _kill_once(bench: Bench, victim: Victim) -> tuple[str, str | None]:
    """Start the run and kill it. Gives the fault's name, and what it hit; None if the run was over before."""
    rng = bench.rng
    whom = rng.choice(("all ranks", "one rank"))
    how = rng.choices(("moment", "change", "write"), weights=(4, 4, 2))[0]
    if how == "moment":
        job = victim.start()
        if not job.wait(seconds=rng.uniform(0, bench.seconds)):
            if whom == "all ranks":
                job.kill()
            else:
                job.signal_one(rng.randrange(bench.topology.world), signal.SIGKILL)
        name = f"SIGKILL of {whom} at a random moment"
    else:
        kind: Kind = "tear" if how == "write" else "kill_all" if whom == "all ranks" else "kill_one"
        job = victim.start(_draw_strike(bench, victim, kind))
        name = "killed in the middle of a write" if how == "write" else f"SIGKILL of {whom} at a change of the folder"
    _end_the_rest(bench, job, KILLED)
    is_hit = bool(KILLED & set(job.statuses()))
    moment = _moment(victim) if is_hit else None
    victim.settle(job)
    if not is_hit and not victim.is_done:
        victim.complain("lost", f"the same command does not go on:\n{job.output[-2000:]}")
    return name, moment


def _draw_strike(bench: Bench, victim: Victim, kind: Kind) -> Strike:
    """At one of the changes that a rank makes from the beginning to the end of a run."""
    # the first rank makes most changes: to folders, documents and logs
    rank = bench.rng.choice((0, 0, bench.rng.randrange(bench.topology.world)))
    is_early = kind == "tear" and bench.rng.random() < EARLY_SHARE
    return Strike(
        kind=kind,
        rank=rank,
        number=bench.rng.randint(1, EARLY if is_early else bench.changes[rank]),
        # from a few bytes, for the small documents, up to more than any file has
        bytes=int(10 ** bench.rng.uniform(0.5, 6)),
        folder=f"{victim.folder}/",
    )


def _end_the_rest(bench: Bench, job: Job, gone: Collection[int]) -> None:
    """When a rank ended with such a status, end the others as a launcher does: ask them, and then insist."""
    job.wait(lambda: any(status is not None for status in job.statuses()), seconds=TIME_LIMIT)
    if not set(gone) & set(job.statuses()):
        return
    if not job.wait(seconds=bench.rng.uniform(0, 0.6)):
        job.signal(signal.SIGTERM)
        if not job.wait(seconds=bench.rng.uniform(0, 0.6)):
            job.kill()


def _moment(victim: Victim) -> str:
    """What a run was doing when it was killed, by what it left."""
    if not read_log(victim.folder).named("stage", first=victim.before.num_events):
        return "start"
    is_saving = any(victim.checkpoints.glob(".*.tmp")) or any(victim.checkpoints.glob(".*.old"))
    return "saving" if is_saving else "training"


def stop_runs(bench: Bench, tally: Tally, times: int, say: Say) -> None:
    """Ask a run to stop, at any moment: it saves, says so, ends well, and goes on with the same command."""
    lives = 0
    victim = bench.victim("stopped-0")
    for number in range(times):
        if victim.is_done:
            victim.discard()
            lives += 1
            victim = bench.victim(f"stopped-{lives}")
        asked = bench.rng.choice(Interrupt.SIGNALS)
        job = victim.start()
        delay = bench.rng.uniform(0.3, 0.9) * bench.seconds
        is_early = not job.wait(seconds=delay)
        job.signal(asked)
        _end_the_rest(bench, job, ASKED)
        victim.settle(job)
        _check_stop(victim, job)
        say(f"{number + 1}/{times} {asked.name} after {delay:.1f} s")
        tally.add("SIGTERM or SIGINT of all ranks", victim.take_problems(), hit=int(is_early))
    if not victim.is_done:
        victim.finish()
        tally.add("SIGTERM or SIGINT of all ranks", victim.take_problems(), hit=0)
    victim.discard()


def _check_stop(victim: Victim, job: Job) -> None:
    """It is done, or it had not begun yet, or it saved what it had done and ended with status 0."""
    statuses = set(job.statuses())
    if victim.is_done:
        return  # it had come to its end, where the signal may find nothing left to save
    log = read_log(victim.folder)
    if statuses & ASKED:
        if log.named("stage", first=victim.before.num_events):
            victim.complain("wrong", f"training was ended by a signal that it should have saved at: {statuses}")
        return
    if statuses != {0}:
        victim.complain("wrong", f"asked to stop, it ended with {statuses}:\n{job.output[-2000:]}")
        return
    steps, stops = log.named("step"), log.named("stopped", first=victim.before.num_events)
    last = max((event["global_step"] for event in steps), default=0)
    after = max((one.step for one in find_checkpoints(victim.folder) if not one.problems), default=0)
    if not stops or after != last:
        victim.complain("wrong", f"asked to stop after step {last}, its newest checkpoint is of step {after}")
