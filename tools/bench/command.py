"""What the commands that time layers have in common: options, the device, and how a result is given."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.check import CheckError
from bench.report import write_json

INTERRUPTED = 130

Result = dict[str, Any]


def add_measuring_options(parser: argparse.ArgumentParser, *, floor: str) -> None:
    """Options behind those of sizes. floor: what the variants are compared with."""
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's time, for a busy machine; no GPU"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--variants", help=f"comma-separated; {floor} always runs (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)


def parse_measuring(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments; the parser ends the program on numbers of rounds or threads that cannot be."""
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.warmup < 0 or args.threads < 1:
        parser.error("--repeats and --threads: 1 and above; --warmup: 0 and above")
    return args


def prepare_device(args: argparse.Namespace) -> torch.device:
    """The device that is asked for, and torch's threads set.

    Raises:
        ValueError: there is no such device, or the clock cannot see it.
    """
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {args.device}, but torch sees no GPU; allowed: cpu")
    if device.type == "cuda" and args.clock == "cpu":
        raise ValueError("--clock: cpu, but the GPU's work is not in the process's time; allowed: wall")
    if device.type == "cpu":
        # read when deepspeed is first imported, which then looks for no GPU and builds nothing
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(args.threads)
    return device


def give(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Console], tuple[Result, bool]],
    markdown: Callable[[Result], str],
) -> int:
    """Measure, print the page, write the files; the exit status.

    run: the result, and whether Ctrl-C cut it short.
    """
    console = Console(stderr=True)
    try:
        result, is_interrupted = run(args, console)
    except CheckError as error:
        console.print(f"check failed: {error}", markup=False)
        return 1
    except ValueError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted before the first round was complete: nothing to report")
        return INTERRUPTED
    page = markdown(result)
    print(page)
    if args.json is not None:
        write_json(args.json, result)
        console.print(f"wrote {args.json}", markup=False)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(page)
        console.print(f"wrote {args.markdown}", markup=False)
    return INTERRUPTED if is_interrupted else 0
