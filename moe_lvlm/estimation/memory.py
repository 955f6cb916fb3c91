"""Memory of one device at its peak, by what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lvlm.estimation.parts import CONNECTOR, HEAD, TOWER, VLM
from moe_lvlm.estimation.probe import ATTENTION, DENSE_FFN, OTHER, Probe
from moe_lvlm.estimation.recorder import SHARED, Region
from moe_lvlm.estimation.stand_ins import routed_rows
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.types import LANGUAGE_MODEL
from moe_lvlm.training.memory import ParameterGroup, parameter_table, state_memory

BYTES = {"bf16": 2, "fp32": 4}
_FFN_NAMES = {ATTENTION: "attention", DENSE_FFN: "dense FFN", OTHER: "norms and residuals"}
# DeepSpeed's own, where a file does not say otherwise
_BUCKET, _PREFETCH, _MOST_LIVE = 500_000_000, 50_000_000, 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the peak. states: weights, gradients, optimizer. activations: saved for the backward pass, by kind.
    transient: what lives for a moment. reserved: what no tensor gets. host: of this process, by offload."""

    states: Mapping[str, int]
    activations: Mapping[str, int]
    transient: Mapping[str, int]
    reserved: int
    host: int

    @property
    def saved(self) -> int:
        """What autograd keeps between forward and backward but for logits."""
        return sum(self.activations.values())

    @property
    def device(self) -> int:
        return sum((*self.states.values(), *self.activations.values(), *self.transient.values(), self.reserved))

    @property
    def rows(self) -> dict[str, int]:
        """All kinds with their bytes."""
        return {**self.states, **self.activations, **self.transient, "CUDA context, allocator": self.reserved}


def estimate_memory(
    model: VLM,
    probed: Probe,
    *,
    precision: str,
    zero: Mapping[str, Any],
    world_size: int,
    expert_parallel_size: int,
    repeated: frozenset[tuple[str, int]],
    reserved: int,
    tokens: int,
    tail_share: float,
) -> MemoryEstimate:
    """zero: `zero_optimization` of the DeepSpeed dict. repeated: layers that are checkpointed, by part and index."""
    groups = parameter_table(model)
    states, host = state_bytes(groups, precision, zero, world_size, expert_parallel_size)
    saved = saved_bytes(probed, repeated)
    logits = saved.pop(HEAD, 0) + probed.working.get(HEAD, 0)
    again = max((_layer_bytes(probed, layer) for layer in repeated), default=0)
    working = max(again + probed.working[LANGUAGE_MODEL], probed.working.get(TOWER, 0)) - logits
    transient = {"logits and loss": logits, "working memory of a layer": max(working, 0)}
    transient |= _buffers(groups, BYTES[precision], zero, expert_parallel_size)
    if expert_parallel_size > 1:
        width = model.get_input_embeddings().weight.shape[1]
        rows = max(
            (routed_rows(layer.router, tokens=tokens, tail_share=tail_share) for _, layer in moe_layers(model)),
            default=0,
        )
        # one that is sent and one that arrives
        transient["all-to-all buffers"] = 2 * rows * width * BYTES[precision]
    # The step itself, when no activation lives, may ask for more
    missing = (
        _step_bytes(groups, zero, world_size, expert_parallel_size) - sum(saved.values()) - sum(transient.values())
    )
    transient["optimizer's step"] = max(missing, 0)
    return MemoryEstimate(states=states, activations=saved, transient=transient, reserved=reserved, host=host)


def saved_bytes(probed: Probe, repeated: frozenset[tuple[str, int]] = frozenset()) -> dict[str, int]:
    """Bytes that autograd keeps by kind; what the head keeps under its own name."""
    saved: dict[str, int] = {}
    for region, cost in probed.costs.items():
        if region.part not in probed.has_gradient or (region.part, region.layer) in repeated:
            continue
        name = _name(region)
        saved[name] = saved.get(name, 0) + cost.saved
    kept = sum(probed.layer_inputs[layer] for layer in repeated if layer[0] in probed.has_gradient)
    if kept:
        saved["inputs of checkpointed layers"] = kept
    return saved


def _name(region: Region) -> str:
    if region.part in (TOWER, CONNECTOR, HEAD):
        return region.part
    if region.layer == SHARED:
        return "embeddings, masks, last norm"
    return _FFN_NAMES.get(region.kind, "MoE layers")


def _layer_bytes(probed: Probe, layer: tuple[str, int]) -> int:
    return sum(cost.saved for region, cost in probed.costs.items() if (region.part, region.layer) == layer)


def is_offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return bool(zero.get(key, {}).get("device", "none") != "none")


def state_bytes(
    groups: list[ParameterGroup], precision: str, zero: Mapping[str, Any], world_size: int, expert_parallel_size: int
) -> tuple[dict[str, int], int]:
    """On the device by kind, and on the host."""
    states: dict[str, int] = {}
    host = 0
    for name, is_expert in (("dense", False), ("experts", True)):
        memory = state_memory(
            [group for group in groups if group.is_expert == is_expert],
            bytes_per_weight=BYTES[precision],
            zero_stage=int(zero.get("stage", 0)),
            world_size=world_size,
            expert_parallel_size=expert_parallel_size,
            offloads_optimizer=is_offloaded(zero, "offload_optimizer"),
            offloads_weights=is_offloaded(zero, "offload_param"),
        )
        kinds = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
        states |= {f"{kind}, {name}": size for kind, size in kinds.items()}
        host += memory.host
    return states, host


def _buffers(
    groups: list[ParameterGroup], bytes_per_weight: int, zero: Mapping[str, Any], expert_parallel_size: int
) -> dict[str, int]:
    """ZeRO's bucket, which is made in its full size, and under ZeRO-3 the weights that are gathered at one time."""
    stage = int(zero.get("stage", 0))
    if stage == 0:
        return {}
    num_buckets = 2 if stage <= 2 and zero.get("overlap_comm", False) else 1
    buffers = {"ZeRO's buckets": int(zero.get("reduce_bucket_size", _BUCKET)) * num_buckets * bytes_per_weight}
    if stage == 3:
        held = sum(group.count // (expert_parallel_size if group.is_expert else 1) for group in groups)
        most = int(zero.get("stage3_max_live_parameters", _MOST_LIVE))
        most += int(zero.get("stage3_prefetch_bucket_size", _PREFETCH))
        buffers["ZeRO-3's gathered weights"] = min(held, most) * bytes_per_weight
    return buffers


def _step_bytes(
    groups: list[ParameterGroup], zero: Mapping[str, Any], world_size: int, expert_parallel_size: int
) -> int:
    """Of the optimizer's step: a float32 copy of the gradients, and one temporary of AdamW's."""
    if is_offloaded(zero, "offload_optimizer"):
        return 0
    stage = int(zero.get("stage", 0))
    total = 0
    for group in groups:
        share = expert_parallel_size if group.is_expert else 1
        total += group.trainable // share // (world_size // share if stage >= 1 else 1)
    return 8 * total
