"""Masters and moments as ZeRO 3 stores them: a file a rank, each parameter cut into equal partitions on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moe_lvlm.checkpoint.deepspeed_import.adam import OptimizerRecord
from moe_lvlm.checkpoint.deepspeed_import.collected import Collected, add_pieces, shapes_of
from moe_lvlm.checkpoint.deepspeed_import.placement import Placed, autoep_layers, layer_of
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record, flat
from moe_lvlm.checkpoint.layout import CheckpointError


def read_zero3(models: Sequence[Record], optimizers: Sequence[Record], collected: Collected) -> set[str]:
    """Add all masters and moments. Both: the files of all ranks, in their order.

    Returns the names of the parameters that are trained.
    """
    trained: set[str] = set()
    for rank, (model, record) in enumerate(zip(models, optimizers, strict=True)):
        trained |= _read_rank(rank, len(models), model, record.inside("optimizer_state_dict"), collected)
    return trained


def read_frozen_zero3(models: Sequence[Record], collected: Collected) -> None:
    """Add the weights of what is not trained. Raises CheckpointError on experts, whose groups are not stored."""
    for rank, model in enumerate(models):
        shapes = shapes_of(model.optional("frozen_param_shapes", dict) or {})
        fragments = model.optional("frozen_param_fragments", dict) or {}
        layers = autoep_layers(model)
        for name, shape in shapes.items():
            if layer_of(layers, name) is not None:
                raise CheckpointError(
                    f"{model.where}: {name} is frozen under expert parallelism, which is not supported"
                )
            total = math.prod(shape)
            values = flat(fragments.get(name), f"{model.where}: frozen_param_fragments: {name}")
            size = math.ceil(total / len(models))
            if values.numel() != size:
                if values.numel() == total and rank == 0:  # a parameter that ZeRO does not know
                    collected.add(name, "weight", shape=shape, values=values)
                elif values.numel() != total:
                    raise CheckpointError(
                        f"{model.where}: {name} has a fragment of {values.numel()} elements, {size} are expected"
                    )
                continue
            start = min(rank * size, total)
            piece = values[: min(size, total - start)]
            collected.add(name, "weight", shape=shape, values=piece, start=start)


def _read_rank(rank: int, world_size: int, model: Record, state: Record, collected: Collected) -> set[str]:
    optimizer = OptimizerRecord(state.inside("optimizer_state_dict"), collected)
    masters = state.get("fp32_flat_groups", list)
    shapes = [shapes_of(group) for group in model.get("param_shapes", list)]
    # tensors of the optimizer are numbered in the order of its groups, as sub-groups are
    numbers = [number for group in range(len(optimizer.groups)) for number in optimizer.numbers(group)]
    if not len(masters) == len(shapes) == len(numbers):
        raise CheckpointError(
            f"{state.where}: {len(masters)} masters and {len(numbers)} optimizer tensors, but {len(shapes)} sub-groups "
            f"in {model.where.name}"
        )
    partitions = state.optional("ds_zero_partition_groups", list) or [{}] * len(shapes)
    layers = autoep_layers(model)
    for index, (group_shapes, number) in enumerate(zip(shapes, numbers, strict=True)):
        count, partition = _partition(partitions[index], world_size, rank)
        master = flat(masters[index], f"{state.where}: fp32_flat_groups: {index}")
        group = optimizer.group_of(number)
        adam = optimizer.adam(number, group)
        offset = 0
        for name, shape in group_shapes.items():
            total = math.prod(shape)
            size = math.ceil(total / count)
            layer = layer_of(layers, name)
            placed = Placed(name, shape, 0) if layer is None else layer.place(name, shape, layer.expert_rank, model)
            collected.rate(name, optimizer.rate(group))
            numel = min(size, total - partition * size)
            if numel > 0:  # a rank past the end of a small parameter holds padding only
                add_pieces(
                    collected,
                    name,
                    shape=placed.shape,
                    start=placed.start + partition * size,
                    sources=adam.sources(master),
                    source_range=(offset, offset + numel),
                    step=adam.step,
                )
            offset += size
        _check_size(state, index, master, offset)
    return {name for group_shapes in shapes for name in group_shapes}


def _partition(metadata: Mapping[str, Any], world_size: int, rank: int) -> tuple[int, int]:
    """(number of partitions, this rank's) of a sub-group; stored only where there are experts."""
    return int(metadata.get("partition_count", world_size)), int(metadata.get("partition_rank", rank))


def _check_size(state: Record, index: int, master: Tensor, expected: int) -> None:
    if master.numel() != expected:
        raise CheckpointError(
            f"{state.where}: sub-group {index} has {master.numel()} elements, its parameters' partitions {expected}: the "
            f"checkpoint is torn, or was sharded by MiCS, which is not supported"
        )
