"""The tests that a check of the fabric is made of: a GPU's arithmetic and memory, an all-reduce's sum and speed."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

_SIDE = 512  # of the matrices whose product is compared
_SHARE = 0.8  # of the free memory that is written to
_SMALL = 2**18  # float32 numbers: 1 MiB
_REPEATS = 5
_BYTES = 4  # of a float32


class TestError(RuntimeError):
    """A test failed; the message says how."""

    __test__ = False  # not a test, whatever its name looks like to pytest


def check_device(device: torch.device) -> None:
    """Compare a product of integer matrices with the CPU's, then write to most of the free memory.

    Raises:
        TestError: a wrong result.
        RuntimeError: what CUDA says.
    """
    torch.cuda.set_device(device)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-8, 9, (_SIDE, _SIDE), generator=generator).float() for _ in range(2))
    # Integers far below 2**24: exact in float32 in any order of summation, and in TF32, whose 11 bits hold the factors.
    if not torch.equal((left.to(device) @ right.to(device)).cpu(), left @ right):
        raise TestError("a product of matrices differs from the CPU's")
    free, _ = torch.cuda.mem_get_info(device)
    block = torch.full((int(free * _SHARE),), 85, dtype=torch.uint8, device=device)
    if int(block[0]) != 85 or int(block[-1]) != 85:
        raise TestError("memory does not hold what was written to it")
    del block
    torch.cuda.empty_cache()


def check_sum(device: torch.device) -> None:
    """All-reduce 1 MiB whose sum is known.

    Raises:
        TestError: a wrong sum.
        RuntimeError: what the backend says.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    pattern = torch.arange(_SMALL, dtype=torch.float32, device=device) % 1000
    numbers = pattern + rank
    dist.all_reduce(numbers)
    # Whole numbers below 2**24 for worlds of up to 4000 ranks: exact in float32.
    wrong = int((numbers != pattern * size + size * (size - 1) // 2).sum())
    if wrong:
        raise TestError(f"{wrong} of {_SMALL} sums are wrong")


def measure(device: torch.device, *, mib: int) -> float:
    """Seconds that an all-reduce of so many MiB takes: the median of five, after one that is not counted."""
    numbers = torch.ones(mib * 2**20 // _BYTES, device=device)
    seconds = []
    for _ in range(_REPEATS + 1):
        numbers.fill_(1.0)
        _finish(device)
        start = time.perf_counter()
        dist.all_reduce(numbers)
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def bus_bandwidth(*, mib: int, seconds: float, size: int) -> float:
    """Gigabytes a second that each link of a ring carries: what nccl-tests calls busbw."""
    return mib * 2**20 / seconds * 2 * (size - 1) / size / 1e9


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
