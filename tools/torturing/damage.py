"""Damage to the newest checkpoint: named in the log, passed over, and made good. And to the log itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from moe_lvlm.checkpoint.folder import read_latest
from moe_lvlm.checkpoint.layout import LATEST_FILE, MANIFEST_FILE
from torturing.judge import LOG
from torturing.kills import Say
from torturing.runs import Bench, Victim
from torturing.tally import Tally

Spoil = Callable[[Path, random.Random], str]  # does damage to a run by its newest checkpoint's path; says which


def truncate_file(checkpoint: Path, rng: random.Random) -> str:
    path = _any_file(checkpoint, rng)
    size = rng.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    return f"{path.name} cut to {size} bytes"


def flip_bit(checkpoint: Path, rng: random.Random) -> str:
    path = _any_file(checkpoint, rng)
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.name} flipped"


def remove_shard(checkpoint: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(checkpoint.glob("rank-*.safetensors")))
    path.unlink()
    return f"{path.name} removed"


def remove_manifest(checkpoint: Path, rng: random.Random) -> str:
    (checkpoint / MANIFEST_FILE).unlink()
    return f"{MANIFEST_FILE} removed"


def remove_latest(checkpoint: Path, rng: random.Random) -> str:
    (checkpoint.parent / LATEST_FILE).unlink()
    return f"{LATEST_FILE} removed"


def _any_file(checkpoint: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in checkpoint.iterdir() if path.is_file()))


def tear_log(checkpoint: Path, rng: random.Random) -> str:
    """As a full disk or a crash of the machine does."""
    with (checkpoint.parents[1] / LOG).open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "stage": "tu')
    return f"half a line at the end of {LOG}"


DAMAGE: dict[str, Spoil] = {
    "a truncated file": truncate_file,
    "a flipped bit": flip_bit,
    f"half a line in {LOG}": tear_log,
}
VANISHED: dict[str, Spoil] = {
    "a vanished shard": remove_shard,
    "a vanished manifest": remove_manifest,
    f"a vanished `{LATEST_FILE}`": remove_latest,
}
SPARES = (remove_latest, tear_log)  # leave the newest checkpoint whole


def damage_runs(bench: Bench, tally: Tally, kinds: dict[str, Spoil], times: int, say: Say, *, name: str) -> None:
    """Damage a killed run, go on, kill it and damage it in the next way, and at last let it end; so many runs.

    name: what the runs' folders are called.
    """
    for number in range(times):
        victim = bench.victim(f"{name}-{number}")
        _train_until_saved(victim, 2)
        for fault, spoil in kinds.items():
            newest = read_latest(victim.checkpoints)
            if newest is None:
                break  # the problems say why
            say(f"{newest}: {spoil(victim.checkpoints / newest, bench.rng)}")
            if spoil in SPARES:
                _train_until_saved(victim, victim.num_reported() + 1)
            else:
                victim.spoiled.add(newest)
                _train_until_saved(victim, victim.num_reported() + 2, named=newest)
            tally.add(fault, victim.take_problems())
        victim.finish()
        tally.add(next(iter(kinds)), victim.take_problems(), hit=0)
        victim.discard()


def _train_until_saved(victim: Victim, reported: int, *, named: str | None = None) -> None:
    """Start, and kill once so many checkpoints were reported in all.

    named: a damaged checkpoint that the run must speak of.
    """
    job = victim.start()
    is_there = victim.reach(job, lambda: victim.num_reported() >= reported)
    job.kill()
    victim.settle(job)
    if not is_there:
        victim.complain("lost", f"the same command does not go on:\n{job.output[-2000:]}")
    if named is not None and str(victim.checkpoints / named) not in job.output:
        victim.complain("wrong", f"{named} is damaged, and nothing was said of it:\n{job.output[-2000:]}")
