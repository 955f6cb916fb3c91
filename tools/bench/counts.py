"""What can be counted of one forward and backward pass, and does not wobble as times do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import MIB, Given


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one forward and backward pass.

    host_syncs: times that the host waits for the device; None on a CPU, where nothing waits.
    kernels: launches on the device; None on a CPU.
    allocations: tensors' storages that were made, on the device that the layer runs on.
    """

    host_syncs: int | None
    kernels: int | None
    allocations: int


def count_pass(layer: nn.Module, problem: Given) -> Counts:
    """Count one pass of a layer that has run before, so that nothing is compiled or looked up anew."""
    device = problem.x_BSD.device
    is_cuda = device.type == "cuda"
    x_BSD = problem.x_BSD.detach().requires_grad_()

    def run() -> None:
        layer(x_BSD).backward(problem.grad_BSD)

    host_syncs = count_syncs(run) if is_cuda else None
    layer.zero_grad(set_to_none=True)
    x_BSD.grad = None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        run()
        if is_cuda:
            torch.cuda.synchronize(device)
    layer.zero_grad(set_to_none=True)
    return Counts(host_syncs, count_kernels(profiler) if is_cuda else None, _allocations(profiler, device))


def count_syncs(run: Callable[[], object]) -> int:
    """Times that the host waits for a CUDA device, by torch's own warnings: copies to the host, nonzero and the like.

    Waiting for an event or a stream by name is not among them.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def count_kernels(profiler: Any) -> int:
    """Kernels that ran on the device; copies and fills by the driver are none."""
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events()
    )


def _allocations(profiler: Any, device: torch.device) -> int:
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    # the profiler's tables give sums only; the events themselves are counted
    events = profiler.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.device_type() == kind and event.nbytes() > 0 for event in events)


@dataclass(slots=True)
class Exchanges:
    """All-to-all exchanges of this process: how many, and the bytes that left it for other processes."""

    count: int = 0
    sent_bytes: int = 0
    others: list[str] = field(default_factory=list)

    @property
    def sent_mib(self) -> float:
        return self.sent_bytes / MIB


class CountExchanges(TorchDispatchMode):
    """Counts exchanges while it is entered, those of backward passes among them.

    Other collectives are listed by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exchanges = Exchanges()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name == "alltoall_base_":
                self._add(args)
            else:
                self.exchanges.others.append(name)
        return func(*args, **(kwargs or {}))

    def _add(self, args: Any) -> None:
        given: Tensor = args[1]
        group, send = ProcessGroup.unbox(args[2]), args[4]
        rank, size = group.rank(), group.size()
        kept = send[rank] if send else given.shape[0] // size
        row_bytes = given[:1].numel() * given.element_size() if given.shape[0] else 0
        self.exchanges.count += 1
        self.exchanges.sent_bytes += (given.shape[0] - kept) * row_bytes
