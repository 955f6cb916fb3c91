"""Machines: what they can do at their best, and what part of that programs reach.

Bandwidths are bytes a second in one direction; data sheets of NVLink give both directions together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

Clock = Callable[[], float]

GB = 10**9
GIB = 2**30
TERA = 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """The part of a peak that is reached; guesses, said in docs/scaling.md, until `tools/bench_step.py` has measured.

    products: of FLOP/s, by large matrix products in a transformer. attention: by fused attention. memory: of bandwidth, by
    kernels that only move numbers. links: of NVLink and the network, by large messages.
    """

    products: float = 0.70
    attention: float = 0.40
    memory: float = 0.75
    links: float = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A node of equal devices, and the network between nodes.

    flops: FLOP/s of dense matrix products by precision, as a recipe names it. memory_bytes, memory_bandwidth: of a device.
    reserved_bytes: of the device's memory, taken by the CUDA context, NCCL, cuBLAS and what the allocator cannot use.
    intra_bandwidth: from a device to the others of its node. inter_bandwidth: from a node to the others, all adapters
    together. intra_latency, inter_latency: seconds of one step of an exchange. host_link_bandwidth: of PCIe, a device.
    host_memory_bandwidth: of a node's host. launch_seconds: of the host, to tell the device of one operation;
    is_asynchronous: it does so while the device works.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    memory_bandwidth: float
    reserved_bytes: float = 3.0 * GIB
    devices: int = 8
    intra_bandwidth: float = 32 * GB
    inter_bandwidth: float = 200 * GB
    intra_latency: float = 3e-6
    inter_latency: float = 8e-6
    host_link_bandwidth: float = 25 * GB
    host_memory_bandwidth: float = 200 * GB
    launch_seconds: float = 5e-6
    is_asynchronous: bool = True
    efficiency: Efficiency = Efficiency()

    def with_network(self, adapters: int, gigabits: float) -> Hardware:
        """The same with so many adapters a node, of so many Gb/s each."""
        return replace(self, inter_bandwidth=adapters * gigabits / 8 * GB)


def _device(
    name: str,
    *,
    bf16: float,
    fp32: float,
    memory: float,
    bandwidth: float,
    nvlink: float | None = None,
    pcie: float = 25,
    adapters: float = 200,
) -> Hardware:
    """Numbers as data sheets have them: TFLOP/s without sparsity, GB, TB/s, and GB/s of NVLink in both directions; without
    NVLink, PCIe. pcie: GB/s in one direction that copies reach. adapters: GB/s of all of a node's together."""
    return Hardware(
        name=name,
        flops={"bf16": bf16 * TERA, "fp32": fp32 * TERA},
        memory_bytes=memory * GIB,
        memory_bandwidth=bandwidth * TERA,
        intra_bandwidth=(pcie if nvlink is None else nvlink / 2) * GB,
        inter_bandwidth=adapters * GB,
        host_link_bandwidth=pcie * GB,
    )


# NVIDIA's data sheets: A100 (nvidia-a100-datasheet, SXM 80GB: 312 TFLOP/s bf16, 19.5 fp32, 2,039 GB/s, NVLink 600 GB/s);
# A800, the same but for NVLink 400 GB/s; H100 SXM (989, 67, 3.35 TB/s, 900 GB/s); H800, the same with NVLink 400 GB/s; H200
# (141 GB, 4.8 TB/s); L40S (362, 91.6, 48 GB, 864 GB/s, PCIe 4); GeForce RTX 4090 (165 bf16 with float32 sums, 82.6, 24 GB,
# 1,008 GB/s, PCIe 4). fp32 is plain float32, as torch multiplies unless it is told otherwise. Memory is what torch reports,
# in GiB. A node's network: eight adapters of 200 Gb/s for A-series nodes, of 400 Gb/s for H-series ones, one of 200 else.
HARDWARE: Mapping[str, Hardware] = {
    device.name: device
    for device in (
        _device("a800-80g", bf16=312, fp32=19.5, memory=79.2, bandwidth=2.039, nvlink=400),
        _device("a100-80g", bf16=312, fp32=19.5, memory=79.2, bandwidth=2.039, nvlink=600),
        _device("a100-40g", bf16=312, fp32=19.5, memory=39.4, bandwidth=1.555, nvlink=600),
        _device("h100-80g", bf16=989, fp32=67, memory=79.1, bandwidth=3.35, nvlink=900, pcie=50, adapters=400),
        _device("h800-80g", bf16=989, fp32=67, memory=79.1, bandwidth=3.35, nvlink=400, pcie=50, adapters=400),
        _device("h200", bf16=989, fp32=67, memory=139.7, bandwidth=4.8, nvlink=900, pcie=50, adapters=400),
        _device("l40s", bf16=362, fp32=91.6, memory=44.4, bandwidth=0.864, adapters=25),
        _device("rtx-4090", bf16=165, fp32=82.6, memory=23.5, bandwidth=1.008, adapters=25),
    )
}
# Parts of what torch.cuda.get_device_name says, the longer first.
_CUDA_NAMES = {
    "A800": "a800-80g",
    "A100-SXM4-40GB": "a100-40g",
    "A100": "a100-80g",
    "H100": "h100-80g",
    "H800": "h800-80g",
    "H200": "h200",
    "L40S": "l40s",
    "RTX 4090": "rtx-4090",
}


def find_hardware(name: str) -> Hardware:
    """Hardware by its name in the table.

    Raises:
        ValueError: an unknown name.
    """
    if name not in HARDWARE:
        raise ValueError(f"--gpu: {name}; allowed: {', '.join(HARDWARE)}")
    return HARDWARE[name]


def hardware_of(device_name: str) -> Hardware | None:
    """Hardware by the name that CUDA has for it; None where the table does not know it."""
    return next((HARDWARE[name] for part, name in _CUDA_NAMES.items() if part in device_name), None)


def measure_hardware(device: torch.device | str, *, devices: int = 1, clock: Clock = time.perf_counter) -> Hardware:
    """The machine at hand, by short probes: products of matrices by precision, and operations that only move numbers. Of what
    they reach nothing is discounted, but for attention.

    devices: processes that will work side by side. Between them bytes go through memory on a CPU; on CUDA the table's
    links are taken. clock: seconds of the wall, or of this process alone (time.process_time) where others keep a CPU busy.
    """
    device = torch.device(device)
    flops = {name: _product_flops(device, dtype, clock) for name, dtype in _PRECISIONS.items()}
    bandwidth = _moving_bandwidth(device, clock)
    reached = Efficiency(products=1.0, attention=0.4, memory=1.0, links=1.0)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = hardware_of(name)
        base = known or Hardware(name=name, flops={}, memory_bytes=0, memory_bandwidth=0)
        memory: float = torch.cuda.get_device_properties(device).total_memory
        return replace(
            base, name=name, flops=flops, memory_bytes=memory, memory_bandwidth=bandwidth, devices=devices,
            efficiency=replace(reached, links=base.efficiency.links),
        )  # fmt: skip
    return Hardware(
        name="cpu",
        flops=flops,
        memory_bytes=64 * GIB,
        memory_bandwidth=bandwidth,
        reserved_bytes=0.0,
        devices=devices,
        intra_bandwidth=bandwidth / 4,
        inter_bandwidth=bandwidth / 4,
        intra_latency=100e-6,
        host_link_bandwidth=bandwidth,
        host_memory_bandwidth=bandwidth,
        launch_seconds=_launch_seconds(clock),
        is_asynchronous=False,
        efficiency=reached,
    )


_PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _usual_seconds(work: Callable[[], object], device: torch.device, clock: Clock, *, repeats: int = 9) -> float:
    """The median of a few runs: what others do on the machine slows a step as it slows this."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = clock()
        work()
        _synchronize(device)
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_flops(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Of a product as wide as a language model's on CUDA, as a small model's on a CPU."""
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _usual_seconds(lambda: left @ right.t(), device, clock)


def _moving_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes read and written a second by a sum, a sigmoid and a copy, into memory of their own as in a model: as large as
    activations are, of a small model on a CPU."""
    left, right = (torch.ones(2**28 if device.type == "cuda" else 2**18, device=device) for _ in range(2))
    count = 1 if device.type == "cuda" else 16

    def work() -> None:
        for _ in range(count):
            torch.add(left, right)
            torch.sigmoid(left)
            left.clone()

    num_bytes = 7 * left.numel() * left.element_size()
    return count * num_bytes / _usual_seconds(work, device, clock)


def _launch_seconds(clock: Clock) -> float:
    """Of the smallest operation, on this host."""
    one = torch.zeros(1)
    count = 1000

    def work() -> None:
        for _ in range(count):
            torch.add(one, one)

    return _usual_seconds(work, torch.device("cpu"), clock) / count
