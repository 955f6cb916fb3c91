"""What the commands that time layers have in common: options, the device, and how a result is given."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.check import CheckError
from bench.report import write_json

INTERRUPTED = 130

Result = dict[str, Any]


def add_measuring_options(parser: argparse.ArgumentParser, *, floor: str | None) -> None:
    """Options behind those of sizes. floor: what the variants are compared with; None where there are none."""
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's time, for a busy machine; no GPU"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    if floor is not None:
        parser.add_argument("--variants", help=f"comma-separated; {floor} always runs (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)


def add_png_option(parser: argparse.ArgumentParser) -> None:
    """Of commands that give `give` something to draw with."""
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the result")


def add_figure_options(parser: argparse.ArgumentParser) -> None:
    """What commands add that draw, profile, and tell the share of the device's peak."""
    add_png_option(parser)
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="a trace of each variant (Chrome's JSON) and where its time goes"
    )
    parser.add_argument(
        "--peak-tflops",
        type=_above_zero,
        help="the device's peak in this type, for MFU (default: the GPU's data sheet, or what a matrix product reaches)",
    )


def parse_measuring(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments; the parser ends the program on numbers of rounds or threads that cannot be."""
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.warmup < 0 or args.threads < 1:
        parser.error("--repeats and --threads: 1 and above; --warmup: 0 and above")
    return args


def _above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}; allowed: a number above 0")
    return value


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Seconds by the clock that `--clock` names."""
    return time.process_time if args.clock == "cpu" else time.perf_counter


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
    draw: Callable[[Result, Path], None] | None = None,
) -> int:
    """Measure, print the page, write the files; the exit status.

    run: the result, and whether Ctrl-C cut it short. draw: draws a result for `--png`, of commands that have it.
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
    if draw is not None and args.png is not None:
        draw(result, args.png)
        console.print(f"wrote {args.png}", markup=False)
    return INTERRUPTED if is_interrupted else 0
