"""Experts of deepspeed.moe.layer.MoE under our names: stacked, with the router beside them.

DeepSpeed has a module an expert, `<layer>.deepspeed_moe.experts.deepspeed_experts.<expert>.<parameter>`; ours are
stacks `<layer>.experts.w1` and so on. Experts that are no FFN of the two kinds below keep DeepSpeed's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from moe_lvlm.checkpoint.deepspeed_import.collected import Collected, Found, Segment, Shape
from moe_lvlm.checkpoint.deepspeed_import.placement import STOCK_EXPERT, stock_name
from moe_lvlm.checkpoint.layout import CheckpointError, Kind

# Parameter of one expert -> its stack: w1 gate or first layer, w2 down, w3 up, and their biases
_GATED = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}
_GATED_BIASES = {"gate_proj.bias": "b1", "down_proj.bias": "b2", "up_proj.bias": "b3"}
_TWO_LAYER = {"fc1.weight": "w1", "fc2.weight": "w2"}
_TWO_LAYER_BIASES = {"fc1.bias": "b1", "fc2.bias": "b2"}
_TABLES = (_GATED, {**_GATED, **_GATED_BIASES}, _TWO_LAYER, {**_TWO_LAYER, **_TWO_LAYER_BIASES})

_GATE = "deepspeed_moe.gate.wg.weight"


def is_stock_name(name: str) -> bool:
    """Whether a parameter is of a deepspeed.moe.layer.MoE."""
    return STOCK_EXPERT.fullmatch(name) is not None or name.endswith(f".{_GATE}")


def rename_stock_experts(collected: Collected) -> None:
    """Stack the experts of each layer, in place. Raises CheckpointError if one of them is missing."""
    layers: dict[str, dict[int, set[str]]] = {}
    for name in collected.tensors:
        if match := STOCK_EXPERT.fullmatch(name):
            layers.setdefault(match["layer"], {}).setdefault(int(match["expert"]), set()).add(match["parameter"])
    for name in collected.tensors:
        if name.endswith(f".{_GATE}"):
            layers.setdefault(name.removesuffix(f".{_GATE}"), {})
    renamed = []
    for layer, experts in layers.items():
        num_experts = _num_experts(collected, layer, experts)
        table = next((table for table in _TABLES if all(table.keys() == found for found in experts.values())), None)
        if table is None:
            parameters = ", ".join(sorted(set().union(*experts.values())))
            collected.note(
                f"{layer}: experts are no FFN that is known here ({parameters}): DeepSpeed's names were kept"
            )
            continue
        if any(name.startswith((f"{layer}.mlp.", f"{layer}.coefficient.")) for name in collected.tensors):
            collected.note(
                f"{layer}: a residual MoE; its dense branch and their mixing coefficient have no counterpart here and "
                f"keep DeepSpeed's names"
            )
        for parameter, stack in table.items():
            _stack(collected, [stock_name(layer, expert, parameter) for expert in range(num_experts)], layer, stack)
        _rename(collected, f"{layer}.{_GATE}", f"{layer}.router.gate.weight")
        renamed.append(layer)
    if renamed:
        collected.note(
            f"{len(renamed)} layers of deepspeed.moe.layer.MoE ({renamed[0]}, ...) have our names now, experts stacked; "
            f"k, capacity and the like of their gates are no part of a checkpoint"
        )


def _num_experts(collected: Collected, layer: str, experts: Mapping[int, set[str]]) -> int:
    gate = collected.tensors.get(f"{layer}.{_GATE}")
    shape: Shape = next(iter(gate.values())).shape if gate else ()
    if not shape or set(experts) != set(range(shape[0])):
        raise CheckpointError(
            f"{collected.path}: {layer} has experts {sorted(experts)}, but its gate has shape {shape}, one row an expert: "
            f"the checkpoint is incomplete"
        )
    return shape[0]


def _stack(collected: Collected, names: list[str], layer: str, stack: str) -> None:
    kinds: dict[Kind, Found] = {}
    first = collected.tensors[names[0]]
    for kind, found in first.items():
        kinds[kind] = Found(dtype=found.dtype, shape=(len(names), *found.shape), step=found.step)
    for expert, name in enumerate(names):
        for kind, found in _same_kinds(collected, name, first).items():
            shift = expert * math.prod(found.shape)
            kinds[kind].segments.extend(Segment(one.start + shift, one.values) for one in found.segments)
    rates = {collected.rates[name] for name in names if name in collected.rates}
    if len(rates) > 1:
        raise CheckpointError(
            f"{collected.path}: experts of {layer} have learning rates {sorted(rates)}, allowed is one"
        )
    for name in names:
        del collected.tensors[name]
        collected.rates.pop(name, None)
    collected.tensors[f"{layer}.experts.{stack}"] = kinds
    for rate in rates:
        collected.rate(f"{layer}.experts.{stack}", rate)


def _same_kinds(collected: Collected, name: str, first: Mapping[Kind, Found]) -> dict[Kind, Found]:
    """What was found of an expert, which must be of the same types, shapes and steps as the first one's."""
    found = collected.tensors[name]
    if {kind: (one.dtype, one.shape, one.step) for kind, one in found.items()} != {
        kind: (one.dtype, one.shape, one.step) for kind, one in first.items()
    }:
        raise CheckpointError(f"{collected.path}: {name} differs from the layer's first expert in type, shape or step")
    return found


def _rename(collected: Collected, old: str, new: str) -> None:
    collected.tensors[new] = collected.tensors.pop(old)
    if old in collected.rates:
        collected.rates[new] = collected.rates.pop(old)
