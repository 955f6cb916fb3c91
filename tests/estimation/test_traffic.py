"""Seconds of exchanges, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_lvlm.estimation.hardware import GB, Efficiency, Hardware, find_hardware, hardware_of, measure_hardware
from moe_lvlm.estimation.recorder import Work
from moe_lvlm.estimation.step import work_seconds
from moe_lvlm.estimation.traffic import Group, exchange_seconds, gather_seconds, reduce_seconds, zero_seconds
from moe_lvlm.training.memory import ParameterGroup

# Nodes of 4 devices, 100 GB/s between those of a node, 40 GB/s out of a node; no latency, everything is reached.
NODE = Hardware(
    name="by hand",
    flops={"bf16": 100e12},
    memory_bytes=10 * GB,
    memory_bandwidth=1000 * GB,
    devices=4,
    intra_bandwidth=100 * GB,
    inter_bandwidth=40 * GB,
    intra_latency=0.0,
    inter_latency=0.0,
    efficiency=Efficiency(products=1.0, attention=0.5, memory=1.0, links=1.0),
)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (Group(size=1), 0.0),
        (Group(size=4), 0.75 * 8 / 100),
        # two nodes: half of all comes over the adapters, all devices of a node in one group
        (Group(size=8), 0.5 * 8 / 40),
        # one device of each of two nodes, and three other groups beside it
        (Group(size=2, stride=4), 0.5 * 8 * 4 / 40),
        # pairs within a node
        (Group(size=2), 0.5 * 8 / 100),
    ],
)
def test_gathering_eight_gigabytes(group: Group, expected: float) -> None:
    assert gather_seconds(8 * GB, group, NODE) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (Group(size=1), 0.0),
        (Group(size=4), 0.75 * 8 / 100),
        # half of a device's bytes leave the node, by its quarter of the adapters
        (Group(size=8), 0.5 * 8 / 10),
    ],
)
def test_exchanging_eight_gigabytes(group: Group, expected: float) -> None:
    assert exchange_seconds(8 * GB, group, NODE) == pytest.approx(expected)


def test_small_messages_cost_their_latency() -> None:
    slow = replace(NODE, intra_latency=1.0, inter_latency=5.0)
    # rings: a step to each other process, of which those between two nodes are slow
    assert gather_seconds(1, Group(size=4), slow, messages=3) == pytest.approx(3 * 3)
    assert gather_seconds(1, Group(size=8), slow) == pytest.approx(6 * 1 + 2 * 5)
    # trees: up and down
    assert reduce_seconds(1, Group(size=4), slow, messages=3) == pytest.approx(2 * 3 * 2)
    assert reduce_seconds(1, Group(size=8), slow) == pytest.approx(2 * 3 * 5)
    assert exchange_seconds(1, Group(size=4), slow) == pytest.approx(3)
    assert exchange_seconds(1, Group(size=8), slow) == pytest.approx(35)


GROUPS = [ParameterGroup("language model", 4 * GB, GB, False), ParameterGroup("experts", 8 * GB, 8 * GB, True)]


@pytest.mark.parametrize(
    ("stage", "size", "micro_batches", "expected"),
    [
        # 2 bytes a number, three quarters of them over 100 GB/s; gradients there and back, weights there
        (0, 1, 3, (1 + 8) * 2 * 0.75 / 100 * 2),
        (1, 1, 3, (1 + 8) * 2 * 0.75 / 100 * 3),
        # gradients with each micro-batch
        (2, 1, 3, (1 + 8) * 2 * 0.75 / 100 * (3 * 2 + 1)),
        # all weights twice a micro-batch
        (3, 1, 3, ((1 + 8) * 3 + 12 * 2 * 3) * 2 * 0.75 / 100),
        # experts: half of them, over two processes
        (1, 2, 1, (1 * 0.75 + 4 * 0.5) * 2 / 100 * 3),
        # experts are nobody else's
        (2, 4, 1, 1 * 0.75 * 2 / 100 * 3),
    ],
)
def test_zero(stage: int, size: int, micro_batches: int, expected: float) -> None:
    seconds = zero_seconds(
        GROUPS,
        zero={"stage": stage},
        bytes_per_weight=2,
        world_size=4,
        expert_parallel_size=size,
        num_micro_batches=micro_batches,
        hardware=NODE,
    )
    assert seconds == pytest.approx(expected)


def test_roofline() -> None:
    peak = NODE.flops["bf16"]
    assert work_seconds(Work(products=200e12, product_bytes=1e9), NODE, peak) == pytest.approx(2.0)
    assert work_seconds(Work(products=1e12, product_bytes=3e12), NODE, peak) == pytest.approx(3.0)
    assert work_seconds(Work(moved=5e11), NODE, peak) == pytest.approx(0.5)
    # half of the pairs at half of the peak
    assert work_seconds(Work(pairs=100e12), NODE, peak, pairs=0.5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("cuda_name", "name", "bf16", "bandwidth", "link"),
    [
        ("NVIDIA A800-SXM4-80GB", "a800-80g", 312, 2.039, 200),
        ("NVIDIA A100-SXM4-80GB", "a100-80g", 312, 2.039, 300),
        ("NVIDIA H100 80GB HBM3", "h100-80g", 989, 3.35, 450),
        ("NVIDIA H200", "h200", 989, 4.8, 450),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 165, 1.008, 25),
    ],
)
def test_data_sheets(cuda_name: str, name: str, bf16: float, bandwidth: float, link: float) -> None:
    hardware = find_hardware(name)
    assert hardware_of(cuda_name) is hardware
    assert hardware.flops["bf16"] == bf16 * 1e12
    assert hardware.memory_bandwidth == bandwidth * 1e12
    assert hardware.intra_bandwidth == link * GB


def test_unknown_hardware() -> None:
    assert hardware_of("Some other device") is None
    with pytest.raises(ValueError, match=r"--gpu: b300; allowed: a800-80g, "):
        find_hardware("b300")


def test_this_machine_can_be_measured() -> None:
    here = measure_hardware("cpu", devices=2)
    assert 1e8 < here.flops["fp32"] < 1e14
    assert 1e8 < here.memory_bandwidth < 1e13
    assert here.devices == 2 and not here.is_asynchronous
