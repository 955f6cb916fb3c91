"""Arithmetic that a layer needs, and how much the device can do: what MFU is made of.

T tokens   D model width   F FFN width   E experts   K experts a token   R routed rows
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from bench.measure import synchronize
from bench.problem import DTYPES, Problem, Sizes
from bench.variants import Computes
from moe_lvlm.estimation.hardware import hardware_of

_TERA = 1e12
_PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOP/s of a device in one type, and where the number is from."""

    flops: float
    source: str


def routed_rows(problem: Problem, computes: Computes) -> int:
    """Rows that the function itself needs, whatever a variant computes besides."""
    sizes = problem.sizes
    if computes == "dynamic":
        cosine_TE = normalize(problem.x_BSD[0].float(), dim=-1) @ normalize(problem.gate_ED.float(), dim=-1).T
        return int((cosine_TE > 0).sum())
    tail = sizes.num_tail * (sizes.experts - sizes.top_k) if computes == "ltdr" else 0
    return sizes.tokens * sizes.top_k + tail


def needed_flops(sizes: Sizes, rows: int, *, has_router: bool) -> float:
    """Of a forward and backward pass in which everything is trained: each matrix costs 2 FLOPs a row and number
    forward, and twice that backward."""
    router = sizes.tokens * sizes.experts * sizes.model_width if has_router else 0
    return 6.0 * (rows * 3 * sizes.model_width * sizes.ffn_width + router)


def six_n_flops(sizes: Sizes, *, has_router: bool) -> float:
    """The usual convention, 6 x activated parameters x tokens: an ordinary token's K experts, tail tokens or not."""
    return needed_flops(sizes, sizes.tokens * sizes.top_k, has_router=has_router)


def peak_of(device: torch.device, dtype: torch.dtype, given_tflops: float | None, clock: Callable[[], float]) -> Peak:
    """The peak that was given, else that of the GPU's data sheet, else what a large matrix product reaches here.

    given_tflops: TFLOP/s, or None. clock: in seconds, as the layers are timed by.
    """
    if given_tflops is not None:
        return Peak(given_tflops * _TERA, "given")
    known = hardware_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is not None:
        return Peak(known.flops[_PRECISIONS[dtype]], "data sheet")
    return Peak(probe_flops(device, dtype, clock), "measured by a matrix product")


def probe_flops(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of the fastest of a few products of square matrices."""
    width = 8192 if device.type == "cuda" else 512
    left = torch.randn(width, width, device=device, dtype=dtype)
    right = torch.randn(width, width, device=device, dtype=dtype)
    # as forward passes and weight gradients have them; a CPU without bf16 arithmetic is fast in one alone
    layouts = ((left, right.t()), (left.t(), right))
    seconds = []
    for turn in range(8):
        synchronize(device)
        start = clock()
        torch.mm(*layouts[turn % len(layouts)])
        synchronize(device)
        seconds.append(clock() - start)
    return 2.0 * width**3 / min(seconds)
