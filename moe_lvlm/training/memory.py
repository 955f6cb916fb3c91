"""Memory that weights, gradients and optimizer states take on each process."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moe_lvlm.adapters import adapter_parameters
from moe_lvlm.models.weights import expert_slice
from moe_lvlm.moe.upcycle import moe_layers

# In LLaVA's names and in InstructBLIP's
_PARTS = {
    "model.vision_tower.": "vision tower",
    "model.multi_modal_projector.": "connector",
    "model.connector.": "connector",
    "model.language_model.": "language model",
    "vision_model.": "vision tower",
    "query_tokens": "connector",
    "qformer.": "connector",
    "language_projection.": "connector",
    "language_model.lm_head.": "language-model head",
    "language_model.": "language model",
}
MASTER_AND_MOMENTS = 12  # bytes a trained parameter: float32 master, two float32 moments of AdamW


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """A part of the model. count, trainable: parameters over all experts. is_expert: spread by expert parallelism."""

    name: str
    count: int
    trainable: int
    is_expert: bool


@dataclass(frozen=True, slots=True)
class StateMemory:
    """Bytes on each process, without activations and buffers. host: on the CPU by offload; the others on the device."""

    weights: int
    gradients: int
    optimizer: int
    host: int


def parameter_table(model: nn.Module) -> list[ParameterGroup]:
    """Parameters by part of the model and by expert or not; tied tensors count once.

    Works on meta tensors, and on a process's share under expert parallelism, but not on what ZeRO-3 has partitioned.
    """
    experts = {
        id(parameter)
        for _, layer in moe_layers(model)
        for module in layer.held_by_expert()
        for parameter in module.parameters(recurse=False)
    }
    adapters = adapter_parameters(model)
    groups: dict[tuple[str, bool], list[int]] = {}
    for name, parameter in model.named_parameters():
        is_expert = id(parameter) in experts
        part = "adapters" if name in adapters else _part(name, is_expert)
        counts = groups.setdefault((part, is_expert), [0, 0])
        counts[0] += _logical_numel(parameter)
        counts[1] += _logical_numel(parameter) if parameter.requires_grad else 0
    return [ParameterGroup(part, count, trainable, flag) for (part, flag), (count, trainable) in groups.items()]


def state_memory(
    groups: list[ParameterGroup],
    *,
    bytes_per_weight: int,
    zero_stage: int,
    world_size: int,
    expert_parallel_size: int,
    offloads_optimizer: bool = False,
    offloads_weights: bool = False,
) -> StateMemory:
    """What ZeRO and expert parallelism leave on each process (rounded up a group; padding not counted).

    Experts are spread over expert_parallel_size processes and, by ZeRO, over their replicas; all else over all.
    """
    weights = gradients = optimizer = 0
    for group in groups:
        share = expert_parallel_size if group.is_expert else 1
        replicas = world_size // share
        held, trained = _ceil(group.count, share), _ceil(group.trainable, share)
        weights += bytes_per_weight * _ceil(held, replicas if zero_stage >= 3 else 1)
        gradients += bytes_per_weight * _ceil(trained, replicas if zero_stage >= 2 else 1)
        optimizer += MASTER_AND_MOMENTS * _ceil(trained, replicas if zero_stage >= 1 else 1)
    host = (optimizer if offloads_optimizer else 0) + (weights if offloads_weights else 0)
    return StateMemory(
        weights=0 if offloads_weights else weights,
        gradients=gradients,
        optimizer=0 if offloads_optimizer else optimizer,
        host=host,
    )


def _logical_numel(parameter: nn.Parameter) -> int:
    """Elements over all experts, also where this process holds some of them."""
    held = expert_slice(parameter)
    return parameter.numel() if held is None else parameter.numel() * held.total // (held.stop - held.start)


def _part(name: str, is_expert: bool) -> str:
    if is_expert:
        return "experts"
    if ".router." in name:
        return "routers"
    if ".encoder.layer." in name and (".experts." in name or ".general." in name):
        return "connector's experts"
    if ".shared_experts." in name:
        return "shared experts"
    return next((part for prefix, part in _PARTS.items() if name.startswith(prefix)), "language-model head")


def _ceil(count: int, divisor: int) -> int:
    return -(-count // divisor)
