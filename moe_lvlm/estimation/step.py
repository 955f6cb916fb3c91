"""A training step on paper: its memory, and its time by a roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_lvlm.estimation.flops import StepFlops, checkpointed_layers, count_flops, done_pairs
from moe_lvlm.estimation.hardware import Hardware
from moe_lvlm.estimation.memory import BYTES, MemoryEstimate, estimate_memory, is_offloaded
from moe_lvlm.estimation.parts import CONNECTOR, HEAD, TOWER, VLM, check_model
from moe_lvlm.estimation.probe import ATTENTION, DENSE_FFN, EXPERTS, ROUTER, SHARED_EXPERTS, Probe, probe
from moe_lvlm.estimation.recorder import Region, Work
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.estimation.stand_ins import routed_rows
from moe_lvlm.estimation.traffic import Group, exchange_seconds, zero_seconds
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.types import LANGUAGE_MODEL
from moe_lvlm.training.memory import parameter_table

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_KINDS = {
    ATTENTION: "attention",
    DENSE_FFN: "dense FFN",
    EXPERTS: "experts",
    SHARED_EXPERTS: "experts",
    ROUTER: "routers",
}
EXPOSED_SHARE = 0.5
"""Of what is sent while the device computes (`overlap_comm`, which ZeRO-3 has by default): a guess."""
ADAM_BYTES = 60
"""A trained parameter: torch's AdamW reads and writes master, two moments and the gradient, in several passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a step is made. zero: `zero_optimization` of the DeepSpeed dict. checkpointed: `train.gradient_checkpointing`.
    num_micro_batches: of each process, one after the other. runs_tower: False where features come from a cache."""

    precision: str
    zero: Mapping[str, Any]
    world_size: int = 1
    expert_parallel_size: int = 1
    checkpointed: bool | int = False
    num_micro_batches: int = 1
    runs_tower: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """memory: of each device. seconds: of an optimizer step by kind. flops: of one micro-batch. tokens, samples: of a
    step, over all processes, without padding. peak: FLOP/s of a device."""

    memory: MemoryEstimate
    seconds: Mapping[str, float]
    flops: StepFlops
    num_micro_batches: int
    tokens: int
    samples: int
    peak: float

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total_seconds

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.total_seconds

    @property
    def mfu(self) -> float:
        """By FLOPs that are needed."""
        return self.flops.needed * self.num_micro_batches / self.total_seconds / self.peak

    @property
    def mfu_six_n(self) -> float:
        """By 6N."""
        return self.flops.six_n * self.num_micro_batches / self.total_seconds / self.peak


def estimate_step(
    model: nn.Module, shape: BatchShape, setting: Setting, hardware: Hardware, *, probed: Probe | None = None
) -> StepEstimate:
    """What a step costs when every micro-batch of every process is like this one.

    model: on any device, meta too; whole, or a process's share. probed: of the same model and shape, if it is there
    already (`probe_model`).

    Raises:
        ValueError: another model than ours, more checkpointed layers than it has, or a precision that the hardware's table
            does not have.
    """
    known = check_model(model)
    if setting.precision not in hardware.flops:
        raise ValueError(f"precision: {setting.precision}; {hardware.name} has {', '.join(hardware.flops)}")
    if probed is None:
        probed = probe_model(known, shape, setting)
    repeated = checkpointed_layers(known, setting.checkpointed)
    memory = estimate_memory(
        known,
        probed,
        precision=setting.precision,
        zero=setting.zero,
        world_size=setting.world_size,
        expert_parallel_size=setting.expert_parallel_size,
        repeated=repeated,
        reserved=int(hardware.reserved_bytes),
        tokens=shape.tokens,
        tail_share=shape.tail_share,
    )
    count = setting.num_micro_batches * setting.world_size
    return StepEstimate(
        memory=memory,
        seconds=_seconds(known, shape, setting, hardware, probed, repeated),
        flops=count_flops(known, shape, probed, checkpointed=setting.checkpointed),
        num_micro_batches=setting.num_micro_batches,
        tokens=shape.tokens * count,
        samples=len(shape.sample_lengths) * count,
        peak=hardware.flops[setting.precision],
    )


def probe_model(model: VLM, shape: BatchShape, setting: Setting) -> Probe:
    """What `estimate_step` would probe; it depends on precision, whether experts are spread, and the tower alone."""
    return probe(
        model,
        shape,
        dtype=DTYPES[setting.precision],
        expert_parallel_size=setting.expert_parallel_size,
        runs_tower=setting.runs_tower,
    )


def _seconds(
    model: VLM,
    shape: BatchShape,
    setting: Setting,
    hardware: Hardware,
    probed: Probe,
    repeated: frozenset[tuple[str, int]],
) -> dict[str, float]:
    peak = hardware.flops[setting.precision]
    by_kind: dict[str, float] = {}
    launches = 0
    for region, cost in probed.costs.items():
        pairs = done_pairs(shape, region)
        seconds = work_seconds(cost.forward + cost.backward, hardware, peak, pairs=pairs)
        kind = _kind(region)
        by_kind[kind] = by_kind.get(kind, 0.0) + seconds
        launches += cost.forward.launches + cost.backward.launches
        if (region.part, region.layer) in repeated and region.part in probed.has_gradient:
            again = work_seconds(cost.forward, hardware, peak, pairs=pairs)
            by_kind["recompute"] = by_kind.get("recompute", 0.0) + again
            launches += cost.forward.launches
    told = launches * hardware.launch_seconds
    waiting = max(told - sum(by_kind.values()), 0.0) if hardware.is_asynchronous else told
    count = setting.num_micro_batches
    seconds_by_kind = {kind: seconds * count for kind, seconds in by_kind.items()}
    seconds_by_kind["host, telling the device"] = waiting * count
    computing = sum(seconds_by_kind.values())
    seconds_by_kind["all-to-all"] = count * _exchanges(model, shape, setting, hardware, repeated)
    groups = parameter_table(model)
    sending = zero_seconds(
        groups,
        zero=setting.zero,
        bytes_per_weight=BYTES[setting.precision],
        world_size=setting.world_size,
        expert_parallel_size=setting.expert_parallel_size,
        num_micro_batches=count,
        hardware=hardware,
    )
    if setting.zero.get("overlap_comm", int(setting.zero.get("stage", 0)) == 3):
        # What is sent beside computing slows it, and the first gather and the last reduction have nothing beside them
        sending = max(sending - computing, sending * EXPOSED_SHARE)
    seconds_by_kind["ZeRO"] = sending
    seconds_by_kind["optimizer"] = _optimizer(setting, hardware, groups)
    return seconds_by_kind


def work_seconds(work: Work, hardware: Hardware, peak: float, *, pairs: float = 1.0) -> float:
    """By a roofline: products by their arithmetic or by what they read and write, all else by what it moves.

    pairs: share of attention's pairs that is computed.
    """
    reached = hardware.efficiency
    bandwidth = hardware.memory_bandwidth * reached.memory
    products = work.products / (peak * reached.products) + work.pairs * pairs / (peak * reached.attention)
    return max(products, work.product_bytes / bandwidth) + work.moved / bandwidth


def _kind(region: Region) -> str:
    if region.part in (TOWER, CONNECTOR, HEAD):
        return {HEAD: "language head and loss"}.get(region.part, region.part)
    return _KINDS.get(region.kind, "norms, residuals, masks")


def _exchanges(
    model: VLM, shape: BatchShape, setting: Setting, hardware: Hardware, repeated: frozenset[tuple[str, int]]
) -> float:
    """Of a micro-batch: rows there and back, forward and backward, forward once more where the layer is checkpointed, and
    each time the counts before."""
    group = Group(size=setting.expert_parallel_size)
    if group.size == 1:
        return 0.0
    seconds = 0.0
    width = model.get_input_embeddings().weight.shape[1]
    for _, layer in moe_layers(model):
        rows = routed_rows(layer.router, tokens=shape.tokens, tail_share=shape.tail_share)
        one = exchange_seconds(rows * width * BYTES[setting.precision], group, hardware)
        passes = 3 if (LANGUAGE_MODEL, layer.site.layer) in repeated else 2
        counts = exchange_seconds(8 * layer.router.num_experts, group, hardware)
        weights = exchange_seconds(4 * rows, group, hardware)
        seconds += passes * (2 * one + weights) + (passes - 1) * counts
    return seconds


def _optimizer(setting: Setting, hardware: Hardware, groups: list[Any]) -> float:
    """AdamW on this process's share; on the host, with what goes there and comes back."""
    stage = int(setting.zero.get("stage", 0))
    mine = 0.0
    for group in groups:
        share = setting.expert_parallel_size if group.is_expert else 1
        mine += group.trainable / share / (setting.world_size // share if stage >= 1 else 1)
    if not is_offloaded(setting.zero, "offload_optimizer"):
        return mine * ADAM_BYTES / (hardware.memory_bandwidth * hardware.efficiency.memory)
    processes = min(hardware.devices, setting.world_size)
    moved = mine * 2 * BYTES[setting.precision] / hardware.host_link_bandwidth
    return moved + mine * ADAM_BYTES * processes / (hardware.host_memory_bandwidth * hardware.efficiency.memory)
