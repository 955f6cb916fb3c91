"""Masters and moments as ZeRO 1, ZeRO 2 and BF16_Optimizer store them: a file a rank, one flat partition a group.

A group's parameters lie one after the other, some with padding behind them, and are cut into equal partitions over the
group's ranks: all of them, or for experts those that held the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_lvlm.checkpoint.deepspeed_import.adam import OptimizerRecord
from moe_lvlm.checkpoint.deepspeed_import.collected import Collected, Shape, add_pieces, shapes_of
from moe_lvlm.checkpoint.deepspeed_import.placement import ExpertPlacement, Placed, stock_local_experts
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record, flat
from moe_lvlm.checkpoint.layout import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """One optimizer group: its parameters' shapes in their order, and where each begins in the flat buffer."""

    index: int
    shapes: Mapping[str, Shape]
    offsets: tuple[int, ...]
    total: int
    is_expert: bool
    partition_count: int


def read_zero12(
    model: Record, optimizers: Sequence[Record], placement: ExpertPlacement, collected: Collected
) -> set[str]:
    """Add all masters and moments. optimizers: the files of all ranks, in their order.

    Returns the names of the parameters that are trained, as rank 0 calls them.
    """
    states = [record.inside("optimizer_state_dict") for record in optimizers]
    shapes = [shapes_of(group) for group in model.get("param_shapes", list)]
    local_experts = stock_local_experts({name: shape for group in shapes for name, shape in group.items()})
    for rank, state in enumerate(states):
        base = state.data.get("base_optimizer_state")
        if isinstance(base, list):
            raise CheckpointError(f"{state.where}: zero_optimization.elastic_checkpoint was true; allowed is false")
        optimizer = OptimizerRecord(state.inside("base_optimizer_state"), collected)
        masters = state.get("single_partition_of_fp32_groups", list)
        if not len(masters) == len(shapes) == len(optimizer.groups):
            raise CheckpointError(
                f"{state.where}: {len(masters)} masters and {len(optimizer.groups)} optimizer groups, but "
                f"{len(shapes)} groups in {model.where.name}"
            )
        for index, group_shapes in enumerate(shapes):
            group = _group(state, index, group_shapes, optimizer)
            _read_partition(rank, state, group, optimizer, placement, local_experts, collected)
    return {name for group in shapes for name in group}


def _group(state: Record, index: int, shapes: Mapping[str, Shape], optimizer: OptimizerRecord) -> _Group:
    paddings = state.optional("param_alignment_paddings", list)
    behind = [0] * len(shapes) if paddings is None else paddings[index]
    if len(behind) != len(shapes):
        raise CheckpointError(f"{state.where}: {len(behind)} paddings for {len(shapes)} parameters of group {index}")
    offsets = []
    offset = 0
    for shape, padding in zip(shapes.values(), behind, strict=True):
        offsets.append(offset)
        offset += math.prod(shape) + padding
    return _Group(
        index=index,
        shapes=shapes,
        offsets=tuple(offsets),
        total=offset,
        is_expert=bool(optimizer.groups[index].get("moe", False)),
        partition_count=int(state.get("partition_count", list)[index]),
    )


def _read_partition(
    rank: int,
    state: Record,
    group: _Group,
    optimizer: OptimizerRecord,
    placement: ExpertPlacement,
    local_experts: Mapping[str, int],
    collected: Collected,
) -> None:
    """What one rank's file has of one group."""
    master = flat(state.get("single_partition_of_fp32_groups", list)[group.index], f"{state.where}: {group.index}")
    # ZeRO cuts the padding at the end off the master (not off the moments), BF16_Optimizer does not
    is_cut = "zero_stage" in state.data
    size = master.numel() + (int(state.get("group_paddings", list)[group.index]) if is_cut else 0)
    if size * group.partition_count < group.total:
        raise CheckpointError(
            f"{state.where}: group {group.index} has {group.partition_count} partitions of {size} elements, its "
            f"parameters have {group.total}: the checkpoint is torn"
        )
    expert_rank, partition = placement.ranks(rank, group.partition_count)
    numbers = optimizer.numbers(group.index)
    if len(numbers) != 1:
        raise CheckpointError(f"{state.where}: optimizer group {group.index} has {len(numbers)} tensors, allowed is 1")
    adam = optimizer.adam(numbers[0], group.index)
    first, last = partition * size, (partition + 1) * size
    for (name, shape), offset in zip(group.shapes.items(), group.offsets, strict=True):
        placed = _place(name, shape, group, expert_rank, placement, local_experts)
        collected.rate(placed.name, optimizer.rate(group.index))
        low, high = max(offset, first), min(offset + math.prod(shape), last)
        if low < high:
            add_pieces(
                collected,
                placed.name,
                shape=placed.shape,
                start=placed.start + low - offset,
                sources=adam.sources(master),
                source_range=(low - first, high - first),
                step=adam.step,
            )


def _place(
    name: str,
    shape: Shape,
    group: _Group,
    expert_rank: int,
    placement: ExpertPlacement,
    local_experts: Mapping[str, int],
) -> Placed:
    if not group.is_expert:
        return Placed(name, shape, 0)
    layer = next((prefix for prefix in local_experts if name.startswith(f"{prefix}.deepspeed_moe.")), "")
    return placement.place(name, shape, expert_rank, local_experts.get(layer, 0))
