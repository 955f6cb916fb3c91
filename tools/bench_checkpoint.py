"""Time saving, verifying, resharding, exporting and converting a checkpoint against plain reading and writing.

A synthetic run is made: a LLaVA-like model with sparse layers in training, masters and moments included, all values
random. Before and after each work the disk is probed: its source is read file after file, as many bytes as it writes
are written to one file and fsynced. A work's ratio is its time over that of the faster probe; all begin with the
source's pages dropped from the page cache (as far as the kernel follows that advice; below a virtual disk there may be
other caches).
Memory is anonymous memory above what the process had before, against the largest group of tensors that belong together:
the expert stacks of one layer, one kind of them. Another process watches it, every few milliseconds.

Goals of resharding, exporting and converting: time <= 1.25 x, memory <= 1.2 x the largest group, every byte written
once. Saving and verifying have none. A busy or shared disk makes the probe as noisy as the work: look at the spread;
--dir on a memory file system (/dev/shm) leaves the disk out and compares with the speed of memory.

Examples:
    python tools/bench_checkpoint.py --size 1GiB --repeats 3 --json checkpoint.json --markdown checkpoint.md
    python tools/bench_checkpoint.py --size 200MiB --only merge,split --dir /scratch

JSON: {"hardware": {...}, "config": {...}, "works": {name: {"ratio", "spread", "seconds", "probe_seconds",
"memory_ratio", "peak_bytes", "read_bytes", "written_bytes", "write_ratio", "is_within_goals"}}, "unavailable": {...}}.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terminal import DONE, make_parser, parse_bytes, run

if TYPE_CHECKING:
    from bench.checkpoints import Bench, Work

MAX_TIME, MAX_MEMORY, MAX_WRITTEN = 1.25, 1.2, 1.01
GOAL_WORDS = {True: "met", False: "missed", None: "none set"}
_MIB = 2**20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=parse_bytes, default="1GiB", help="of the checkpoint, about (default: 1GiB)")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each does every work once, in another order")
    parser.add_argument("--only", help="comma-separated works: save, verify, merge, split, drop, export, upcycle")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where to work (default: the current folder)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.experts < 1 or args.threads < 1:
        parser.error("--repeats, --experts and --threads: 1 and above")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when transformers looks for deepspeed's accelerator
    return run(lambda: _bench(args))


def _bench(args: argparse.Namespace) -> int:
    import torch
    from bench.checkpoints import prepare
    from bench.report import describe_hardware, write_json

    torch.set_num_threads(args.threads)
    where = Path.cwd() if args.dir is None else args.dir
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=where) as name:
        _say(f"making a checkpoint of about {args.size / 2**30:.2f} GiB in {name}")
        bench = prepare(Path(name), num_bytes=args.size, num_experts=args.experts, seed=args.seed)
        works = _chosen(bench, args.only)
        rounds = _measure(works, Path(name), args.repeats)
    result = {
        "hardware": describe_hardware(torch.device("cpu")) | {"folder_device": _device(where)},
        "config": {
            "size": args.size,
            "checkpoint_bytes": bench.checkpoint_bytes,
            "experts": args.experts,
            "model_width": bench.width,
            "repeats": args.repeats,
            "threads": args.threads,
            "seed": args.seed,
        },
        "works": {
            work.name: summary(work.label, rounds[work.name], group_bytes=work.group_bytes, has_goal=work.has_goal)
            for work in works
        },
        "unavailable": bench.unavailable,
    }
    page = markdown(result)
    print(page)
    if args.json is not None:
        write_json(args.json, result)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(page)
    return DONE


def _chosen(bench: Bench, only: str | None) -> list[Work]:
    if only is None:
        return list(bench.works)
    wanted, known = only.split(","), [work.name for work in bench.works]
    if unknown := sorted(set(wanted) - set(known) - set(bench.unavailable)):
        raise ValueError(f"--only: {unknown[0]}; allowed: {', '.join([*known, *bench.unavailable])}")
    return [work for work in bench.works if work.name in wanted]


def _measure(works: Sequence[Work], folder: Path, repeats: int) -> dict[str, list[Round]]:
    """What each round found: every work once a round, the order turned by one each time."""
    from bench.disk import MemoryWatch, drop_from_cache, files_of, read_seconds, settle, write_seconds

    noise = os.urandom(16 * _MIB)
    rounds: dict[str, list[Round]] = {work.name: [] for work in works}
    sizes = {work.name: _output_bytes(work) for work in works}
    watch = MemoryWatch()

    def probe(read: Sequence[Path], num_bytes: int) -> tuple[float, float]:
        settle()
        reading = read_seconds(read) if read else 0.0
        return reading, write_seconds(folder / "probe", num_bytes, noise) if num_bytes else 0.0

    for turn in range(repeats):
        first = turn % len(works)
        for work in [*works[first:], *works[:first]]:
            read = [] if work.source is None else files_of(work.source)
            before = probe(read, sizes[work.name])
            settle()
            drop_from_cache(read)
            cost = watch.measure(work.run)
            work.clean()
            after = probe(read, sizes[work.name])
            probe_read, probe_write = min(before[0], after[0]), min(before[1], after[1])
            rounds[work.name].append(
                Round(
                    seconds=cost.seconds,
                    probe_seconds=probe_read + probe_write,
                    peak_bytes=cost.peak_bytes,
                    wrote_bytes=cost.written_bytes,
                    read_bytes=sum(file.stat().st_size for file in read),
                    output_bytes=sizes[work.name],
                )
            )
            seconds = f"{cost.seconds:.2f} s, probe {probe_read:.2f} s reading and {probe_write:.2f} s writing"
            _say(f"round {turn + 1} of {repeats}: {work.label}: {seconds}")
    watch.close()
    return rounds


def _output_bytes(work: Work) -> int:
    """What a work writes, by doing it once, which also imports what it imports late."""
    from bench.disk import files_of

    work.run()
    size = sum(file.stat().st_size for file in files_of(work.output) if file.name != "latest")
    work.clean()
    return size


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One measurement. probe_seconds: of plain reading and writing. wrote_bytes: handed to write calls; output_bytes:
    of the files that were left."""

    seconds: float
    probe_seconds: float
    peak_bytes: int
    wrote_bytes: int
    read_bytes: int
    output_bytes: int


def summary(label: str, rounds: Sequence[Round], *, group_bytes: int, has_goal: bool) -> dict[str, Any]:
    """Medians over the rounds; spread: from the lowest to the highest ratio, over the median."""
    ratios = [one.seconds / one.probe_seconds for one in rounds]
    ratio, output = statistics.median(ratios), rounds[0].output_bytes
    peak = statistics.median(one.peak_bytes for one in rounds)
    written = statistics.median(one.wrote_bytes / output for one in rounds) if output else None
    is_good = ratio <= MAX_TIME and peak <= MAX_MEMORY * group_bytes and (written or 1.0) <= MAX_WRITTEN
    return {
        "label": label,
        "ratio": ratio,
        "spread": (max(ratios) - min(ratios)) / ratio,
        "seconds": statistics.median(one.seconds for one in rounds),
        "probe_seconds": statistics.median(one.probe_seconds for one in rounds),
        "memory_ratio": peak / group_bytes,
        "peak_bytes": peak,
        "group_bytes": group_bytes,
        "read_bytes": rounds[0].read_bytes,
        "written_bytes": output,
        "write_ratio": written,
        "is_within_goals": is_good if has_goal else None,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: hardware, sizes, one table."""
    hardware, config = result["hardware"], result["config"]
    lines = [
        f"**{hardware['cpu']}**, {hardware['cores']} cores, {hardware['folder_device']}, torch {hardware['torch']}; "
        f"load {hardware['load_average']}",
        "",
        f"A checkpoint of {config['checkpoint_bytes'] / _MIB:,.0f} MiB, D {config['model_width']}, {config['experts']} "
        f"experts, {config['repeats']} rounds. Ratio: time over that of plain reading and writing, the faster of two probes "
        "around it (median; spread, highest - lowest over the median). Memory: anonymous peak over the largest group.",
        "",
        "| work | ratio (spread) | s | probe s | read MiB | written MiB | write calls / files | peak MiB | / group | goals |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["works"].values():
        written = "" if row["write_ratio"] is None else f"{row['write_ratio']:.3f}"
        lines.append(
            f"| {row['label']} | {row['ratio']:.2f} ({row['spread']:.2f}) | {row['seconds']:.2f} | "
            f"{row['probe_seconds']:.2f} | {row['read_bytes'] / _MIB:,.0f} | {row['written_bytes'] / _MIB:,.0f} | "
            f"{written} | {row['peak_bytes'] / _MIB:,.0f} | {row['memory_ratio']:.2f} | "
            f"{GOAL_WORDS[row['is_within_goals']]} |"
        )
    lines += [f"| {name} | not measured: {reason} | | | | | | | | |" for name, reason in result["unavailable"].items()]
    return "\n".join(lines) + "\n"


def _device(folder: Path) -> str:
    """File system and device of a folder, from the kernel's list of mounts."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    here = folder.resolve()
    fitting = [mount for mount in mounts if here.is_relative_to(mount[1])]
    device, _, kind = max(fitting, key=lambda mount: len(mount[1]))
    return f"{kind} on {Path(device).name}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
