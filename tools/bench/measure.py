"""Time, memory and drops of layers, interleaved."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

MIB = 2**20
Layer = TypeVar("Layer", bound=nn.Module)
Result = TypeVar("Result")


class Given(Protocol):
    """What a layer is run on: an input, and the gradient of its output."""

    @property
    def x_BSD(self) -> Tensor: ...

    @property
    def grad_BSD(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by name, one a complete round; whether Ctrl-C ended them early."""

    seconds: dict[str, list[float]]
    is_interrupted: bool

    @property
    def num_rounds(self) -> int:
        return len(next(iter(self.seconds.values())))


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
    """Seconds of forward and backward of layers on the same problem (see `interleave`).

    clock: seconds of the wall, or of this process alone (time.process_time) where others keep the machine busy.
    """
    runs = {name: lambda layer=layer: run_once(layer, problem, clock) for name, layer in layers.items()}
    return interleave(runs, repeats=repeats, warmup=warmup, seed=seed, advance=advance)


def interleave(
    runs: Mapping[str, Callable[[], float]],
    *,
    repeats: int,
    warmup: int,
    seed: int,
    advance: Callable[[str], None] = lambda name: None,
) -> Timings:
    """Every round calls each of `runs` once, in a new order, so that a slow second of the machine hits all alike.

    runs: each returns the seconds that it took. advance: called with the name of each before it runs.
    """
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    try:
        for turn in range(warmup + repeats):
            shuffle(order)
            round_seconds = {}
            for name in order:
                advance(name)
                round_seconds[name] = runs[name]()
            if turn >= warmup:
                for name, value in round_seconds.items():
                    seconds[name].append(value)
    except KeyboardInterrupt:
        return Timings(seconds, is_interrupted=True)
    return Timings(seconds, is_interrupted=False)


def drop_too_large(layers: dict[str, Layer], problem: Given, *, kept: Collection[str]) -> dict[str, str]:
    """Run each layer once and take out of `layers` those for which the device has too little memory, with the reason.

    kept: names of layers that must run; their error comes through.
    """
    reasons = {}
    for name, layer in list(layers.items()):
        try:
            layer(problem.x_BSD.detach().requires_grad_()).backward(problem.grad_BSD)
        except torch.OutOfMemoryError as error:
            if name in kept:
                raise
            reasons[name] = f"too little memory: {str(error).splitlines()[0]}"
            del layers[name]
        layer.zero_grad(set_to_none=True)
    if reasons:
        torch.cuda.empty_cache()  # pieces of what did not fit would be in the way of what does
    return reasons


def run_once(layer: nn.Module, problem: Given, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one forward and backward pass; gradients are made anew, as after zero_grad(set_to_none=True)."""
    x_BSD = problem.x_BSD.detach().requires_grad_()
    synchronize(x_BSD.device)
    start = clock()
    layer(x_BSD).backward(problem.grad_BSD)
    synchronize(x_BSD.device)
    elapsed = clock() - start
    layer.zero_grad(set_to_none=True)
    return elapsed


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_mib(layer: nn.Module, problem: Given) -> float:
    """MiB that autograd keeps of a layer between forward and backward, as `watch_saved` counts them."""
    return watch_saved(lambda: layer(problem.x_BSD.detach().requires_grad_()), layer)[1]


def watch_saved(forward: Callable[[], Result], model: nn.Module) -> tuple[Result, float]:
    """What a forward pass returns, and the MiB that autograd keeps of it: each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address and address not in parameters:
            kept[address] = tensor  # held, so that no other storage can take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    return output, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / MIB


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
