"""See that training survives: a tiny run is killed, damaged, filled up and doubled, and must end as if it had not been.

It trains a tiny recipe of its own (random weights, a synthetic dataset) once unbroken, then again and again with
faults, always going on with the same command. After each fault no checkpoint that was reported may be lost, a resume
must be from the newest whole one, and every loss and every weight must equal the unbroken run's, bit for bit.

faults:
  kill    SIGKILL of all ranks or of one, at random moments and at changes of the run's folder; torn writes
  stop    SIGTERM and SIGINT at random moments: it saves and ends well
  disk    little room, a full disk (a tmpfs, where one can be mounted), writes that fail
  damage  a truncated file or a flipped bit in the newest checkpoint, half a line in the log
  vanish  a vanished shard, manifest, or `latest` (which names the newest checkpoint)
  second  a second run in the same folder

Examples:
    python tools/torture.py
    python tools/torture.py --kills 200 --background --json torture.json
    python tools/torture.py --faults kill,damage --zero 3 --precision bf16 --dir /scratch/torture --keep

Exit status: 0, all survived; 1, something was lost or differed (the run's folder is kept and named); 2, a mistake in
the options. What could not be tried on this machine is said.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import terminal

if TYPE_CHECKING:
    from torturing.runs import Bench
    from torturing.tally import Tally

FAULTS = ("kill", "stop", "disk", "damage", "vanish", "second")


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = terminal.make_parser(__doc__)
    parser.add_argument(
        "--kills", type=_positive, default=20, help="how often a run is killed; other faults a 20th of it"
    )
    parser.add_argument(
        "--faults", type=_faults, default=FAULTS, metavar="LIST", help="all, or some, with commas between"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages")
    parser.add_argument("--world", type=_positive, default=2, help="ranks")
    parser.add_argument("--ep", type=_positive, default=2, help="expert-parallel size")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--background", action=BooleanOptionalAction, default=False, help="write checkpoints beside training"
    )
    parser.add_argument("--dir", type=Path, help="a new or empty folder for the runs (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and all problems")
    parser.add_argument("--keep", action="store_true", help="keep all runs' folders")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}; allowed: a whole number above 0")
    return int(text)


def _faults(text: str) -> tuple[str, ...]:
    wanted = FAULTS if text == "all" else tuple(text.split(","))
    if unknown := [name for name in wanted if name not in FAULTS]:
        raise ArgumentTypeError(f"{', '.join(unknown)}; allowed: all, or some of {', '.join(FAULTS)}")
    return wanted


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # so that ranks and mounts go when a batch system asks this program to
    signal.signal(signal.SIGTERM, _interrupt)
    return terminal.run(lambda: torture(args))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def torture(args: Namespace) -> int:
    """Do what the options say; the exit status."""
    # after the options: these import torch, for seconds
    from torturing.inputs import Topology
    from torturing.jobs import Server
    from torturing.runs import set_up
    from torturing.tally import Tally

    topology = Topology(
        world=args.world, expert_parallel=args.ep, zero=args.zero, precision=args.precision, background=args.background
    )
    started = time.monotonic()
    tally = Tally()
    folder = _make_folder(args.dir)
    is_suspect = False
    try:
        (folder / "output").mkdir()
        with Server(folder / "output") as server:
            _say("the unbroken run")
            bench = set_up(server, folder, topology, seed=args.seed, is_kept=args.keep)
            _say(f"{bench.judge.num_steps} steps in {bench.seconds:.1f} s, with a checkpoint after each")
            _apply(args, bench, tally)
        is_suspect = not tally.is_good
    finally:
        if not args.keep and not is_suspect:
            shutil.rmtree(folder)
    seconds = time.monotonic() - started
    if args.json is not None:
        options = {key: value for key, value in vars(args).items() if key not in ("json", "dir")}
        result = {"options": options, "seconds": round(seconds), **tally.to_json()}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _report(tally, seconds, folder if folder.exists() else None)
    return terminal.DONE if tally.is_good else terminal.FAILED


def _make_folder(wanted: Path | None) -> Path:
    """Where the runs lie. At the end it is removed, unless something was lost or differed."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="torture-"))
    folder = wanted.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--dir: {folder} is there and not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _apply(args: Namespace, bench: Bench, tally: Tally) -> None:
    """All faults that are wanted."""
    from torturing.collisions import fill_disks, second_runs
    from torturing.damage import DAMAGE, VANISHED, damage_runs
    from torturing.kills import kill_runs, stop_runs

    times = max(1, args.kills // 20)
    if "kill" in args.faults:
        kill_runs(bench, tally, args.kills, _say)
    if "stop" in args.faults:
        stop_runs(bench, tally, 2 * times, _say)
    if "disk" in args.faults:
        fill_disks(bench, tally, times, _say)
    if "damage" in args.faults:
        damage_runs(bench, tally, DAMAGE, times, _say, name="damaged")
    if "vanish" in args.faults:
        damage_runs(bench, tally, VANISHED, times, _say, name="vanished")
    if "second" in args.faults:
        second_runs(bench, tally, times, _say)


def _report(tally: Tally, seconds: float, folder: Path | None) -> None:
    print(tally.table())
    for note in tally.notes:
        print(f"\nnote: {note}")
    for name, row in tally.rows.items():
        for problem in row.problems:
            print(f"\n{problem.kind}, after {name}: {problem.text}")
    print(f"\n{seconds:.0f} s" + ("" if folder is None else f"; the runs lie in {folder}"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
