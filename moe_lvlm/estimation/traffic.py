"""Bytes that a step sends between processes, and how long that takes.

Processes are laid out node by node, and an expert-parallel group is of neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lvlm.estimation.hardware import Hardware
from moe_lvlm.training.memory import ParameterGroup

_BUCKET, _PREFETCH = 500_000_000, 50_000_000  # DeepSpeed's own, in elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Processes that exchange something. size: of them. stride: from one to the next, in ranks."""

    size: int
    stride: int = 1

    def nodes(self, hardware: Hardware) -> int:
        """Nodes that the group touches."""
        if self.size == 1:
            return 1
        return max(1, min(self.size, math.ceil(self.size * self.stride / hardware.devices)))


def gather_seconds(num_bytes: float, group: Group, hardware: Hardware, *, messages: float = 1) -> float:
    """An all-gather, or a reduce-scatter, of so many bytes in all, by rings: each message takes a step a process."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    nodes = group.nodes(hardware)
    steps = (group.size - nodes) * hardware.intra_latency + (nodes if nodes > 1 else 0) * hardware.inter_latency
    return _passing(num_bytes, group, hardware) + messages * steps


def reduce_seconds(num_bytes: float, group: Group, hardware: Hardware, *, messages: float = 1) -> float:
    """An all-reduce: twice the bytes of an all-gather, by trees, whose steps grow with the logarithm."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    latency = hardware.inter_latency if group.nodes(hardware) > 1 else hardware.intra_latency
    return 2 * (_passing(num_bytes, group, hardware) + messages * latency * math.ceil(math.log2(group.size)))


def _passing(num_bytes: float, group: Group, hardware: Hardware) -> float:
    """Rings within nodes and between them work at once, and each node's adapters carry all of it once; groups of a stride,
    which work side by side, share the adapters."""
    nodes, reach = group.nodes(hardware), hardware.efficiency.links
    members = group.size / nodes
    inside = num_bytes * (members - 1) / members / (hardware.intra_bandwidth * reach)
    if nodes == 1:
        return inside
    beside = max(hardware.devices / members, 1)
    return max(inside, num_bytes * beside * (nodes - 1) / nodes / (hardware.inter_bandwidth * reach))


def exchange_seconds(num_bytes: float, group: Group, hardware: Hardware) -> float:
    """An all-to-all to which each process brings so many bytes, spread evenly over the group."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    nodes, reach = group.nodes(hardware), hardware.efficiency.links
    per_node = group.size / nodes
    inside = num_bytes * (per_node - 1) / group.size / (hardware.intra_bandwidth * reach)
    latency = hardware.intra_latency
    outside = 0.0
    if nodes > 1:
        share = hardware.inter_bandwidth / hardware.devices
        outside = num_bytes * (group.size - per_node) / group.size / (share * reach)
        latency = hardware.inter_latency
    return max(inside, outside) + latency * (group.size - 1)


def zero_seconds(
    groups: list[ParameterGroup],
    *,
    zero: Mapping[str, Any],
    bytes_per_weight: int,
    world_size: int,
    expert_parallel_size: int,
    num_micro_batches: int,
    hardware: Hardware,
) -> float:
    """Reducing gradients and gathering weights, of one optimizer step.

    Under ZeRO 0, 1 and 2 gradients are all-reduced, as DeepSpeed does it with buckets that belong to several processes:
    once a step under 0 and 1, with each micro-batch under 2; the weights that were updated are gathered once. Under ZeRO 3
    gradients are reduced and scattered with each micro-batch, and all weights gathered twice (forward, backward).
    """
    stage = int(zero.get("stage", 0))
    bucket = int(zero.get("reduce_bucket_size", _BUCKET))
    seconds = 0.0
    for is_expert in (False, True):
        share = expert_parallel_size if is_expert else 1
        group = Group(size=world_size // share, stride=share)
        mine = [one for one in groups if one.is_expert == is_expert]
        trained = sum(one.trainable for one in mine) / share
        held = sum(one.count for one in mine) / share
        messages = math.ceil(trained / bucket)
        prefetched = math.ceil(held / int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)))
        gradients, weights = trained * bytes_per_weight, held * bytes_per_weight
        if stage <= 2:
            reduces = num_micro_batches if stage == 2 else 1
            seconds += reduces * reduce_seconds(gradients, group, hardware, messages=messages)
            if stage >= 1:
                seconds += gather_seconds(gradients, group, hardware, messages=messages)
        else:
            scattered = gather_seconds(gradients, group, hardware, messages=messages)
            gathered = gather_seconds(weights, group, hardware, messages=prefetched)
            seconds += num_micro_batches * (scattered + 2 * gathered)
    return seconds
