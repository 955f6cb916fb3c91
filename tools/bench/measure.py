"""Time, memory and drops of layers, interleaved."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bench.variants import DENSE

MIB = 2**20


class Given(Protocol):
    """What a layer is run on: an input, and the gradient of its output."""

    @property
    def x_BSD(self) -> Tensor: ...

    @property
    def grad_BSD(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of forward and backward by variant, one a complete round; whether Ctrl-C ended them early."""

    seconds: dict[str, list[float]]
    is_interrupted: bool

    @property
    def num_rounds(self) -> int:
        return len(self.seconds[DENSE])


def time_interleaved(
    layers: Mapping[str, nn.Module],
    problem: Given,
    *,
    repeats: int,
    warmup: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[str], None] = lambda name: None,
) -> Timings:
    """Every round runs each layer once, in a new order, so that a slow second of the machine hits all alike.

    clock: seconds of the wall, or of this process alone (time.process_time) where others keep the machine busy.
    advance: called with the name of each layer before it runs.
    """
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    order = list(layers)
    try:
        for turn in range(warmup + repeats):
            shuffle(order)
            round_seconds = {}
            for name in order:
                advance(name)
                round_seconds[name] = run_once(layers[name], problem, clock)
            if turn >= warmup:
                for name, value in round_seconds.items():
                    seconds[name].append(value)
    except KeyboardInterrupt:
        return Timings(seconds, is_interrupted=True)
    return Timings(seconds, is_interrupted=False)


def run_once(layer: nn.Module, problem: Given, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one forward and backward pass; gradients are made anew, as after zero_grad(set_to_none=True)."""
    x_BSD = problem.x_BSD.detach().requires_grad_()
    _synchronize(x_BSD.device)
    start = clock()
    layer(x_BSD).backward(problem.grad_BSD)
    _synchronize(x_BSD.device)
    elapsed = clock() - start
    layer.zero_grad(set_to_none=True)
    return elapsed


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_mib(layer: nn.Module, problem: Given) -> float:
    """MiB that autograd keeps between forward and backward: each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address and address not in parameters:
            kept[address] = tensor  # held, so that no other storage can take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(problem.x_BSD.detach().requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / MIB


def peak_mib(layer: nn.Module, problem: Given) -> float | None:
    """Peak MiB of device memory above what lay there before; None where the device does not tell (CPU)."""
    device = problem.x_BSD.device
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_once(layer, problem)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def ratio_and_spread(seconds: Sequence[float], floor: Sequence[float]) -> tuple[float, float]:
    """Median over rounds of time / floor's time, and (p90 - p10) / median of the same.

    The floor against itself gives ratio 1 and the spread of its times, which says how noisy the machine was.
    """
    if seconds is floor:
        return 1.0, _spread(seconds)
    ratios = [value / base for value, base in zip(seconds, floor, strict=True)]
    return statistics.median(ratios), _spread(ratios)


def _spread(values: Sequence[float]) -> float:
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    return float(high - low) / statistics.median(values)
