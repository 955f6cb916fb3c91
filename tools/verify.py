"""Say whether checkpoints and model folders are whole, and if not, what is wrong with which file.

PATH is a checkpoint of a run, a run's folder (all its checkpoints, and that `latest` names one of them), or a model
folder (config.json and safetensors files). Looked at are:
  * the files: each one that manifest.json or checksums.json names is there with its size and checksum, none besides;
  * the tensors: every element is in some file, once; masters, moments and counts of steps fit each other;
  * the model: names, shapes and numbers of experts are those of the model that config.json describes;
  * the state of training: counts, learning rates, one random number generator a rank;
  * the values: no NaN and no infinity.

--quick compares the files' sizes only and reads no values, so that it takes a second whatever the size: it finds what
is missing or does not fit, not a flipped bit.

Examples:
    python tools/verify.py runs/quickstart
    python tools/verify.py runs/a/checkpoints/sparse-000160 exported/ --json verdicts.json
    python tools/verify.py --quick runs/*

Exit status: 0 everything is well, 1 something is wrong (one line each on stdout), 2 a mistake in the arguments.
JSON: [{"path", "form", "problems": [...], "files", "bytes", "seconds", "is_quick"}, ...].
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from terminal import DONE, FAILED, byte_progress, make_parser, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="sizes instead of checksums, and no values")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the verdicts there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parse_args(argv)
    return run(lambda: _verify(args))


def _verify(args: argparse.Namespace) -> int:
    from moe_lvlm.conversion.check import bytes_to_read, check, find_folders  # after --help, which needs no torch

    folders = list(dict.fromkeys(folder for path in args.paths for folder in find_folders(path)))
    verdicts = []
    total = sum(bytes_to_read(folder, is_quick=args.quick) for folder in folders)
    with byte_progress("verify", total) as advance:
        for folder in folders:
            verdicts.append(check(folder, is_quick=args.quick, advance=advance))
    for verdict in verdicts:
        size = f"{verdict.files} files, {verdict.bytes:,} bytes, {verdict.seconds:.1f} s"
        extent = "sizes and structure" if verdict.is_quick else "all of it"
        if verdict.problems:
            print(f"{verdict.path}: {verdict.form}, {len(verdict.problems)} problem{'s'[: len(verdict.problems) > 1]}")
        elif verdict.form == "run":
            print(f"{verdict.path}: run, well")
        else:
            print(f"{verdict.path}: {verdict.form}, well ({extent}; {size})")
        for problem in verdict.problems:
            print(f"  {problem}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        records = [asdict(verdict) | {"path": str(verdict.path)} for verdict in verdicts]
        args.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    return FAILED if any(verdict.problems for verdict in verdicts) else DONE


if __name__ == "__main__":
    sys.exit(main())
