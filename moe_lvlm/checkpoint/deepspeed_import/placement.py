"""Whose experts a rank's file holds, and what they are called in the whole model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from moe_lvlm.checkpoint.deepspeed_import.collected import Shape
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record
from moe_lvlm.checkpoint.layout import CheckpointError

MoEKind = Literal["stock", "autoep"]

# a parameter of an expert of deepspeed.moe.layer.MoE
STOCK_EXPERT = re.compile(
    r"(?P<layer>.+)\.deepspeed_moe\.experts\.deepspeed_experts\.(?P<expert>\d+)\.(?P<parameter>.+)"
)

# the expert parameters that every AutoEP layer has, and the only ones that DeepSpeed's own tools know
AUTOEP_STACKS = ("w1", "w2", "w3")


class Placed(NamedTuple):
    """A rank's parameter in the whole model: its name and shape there, and at which element it begins."""

    name: str
    shape: Shape
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoEPLayer:
    """A layer under DeepSpeed's AutoEP contract. prefix: of the names of its expert parameters."""

    prefix: str
    num_experts: int
    num_local_experts: int
    expert_rank: int

    def place(self, name: str, shape: Shape, expert_rank: int, record: Record) -> Placed:
        """Rows of a stacked parameter [E_local, ...] in [E, ...]."""
        if not shape or shape[0] != self.num_local_experts:
            raise CheckpointError(
                f"{record.where}: {name} has shape {shape}, its first size must be {self.num_local_experts} experts"
            )
        start = expert_rank * self.num_local_experts * math.prod(shape[1:])
        return Placed(name, (self.num_experts, *shape[1:]), start)


class ExpertPlacement:
    """How experts were spread over the ranks that saved."""

    def __init__(self, model: Record, world_size: int) -> None:
        self._model = model
        self._world_size = world_size
        config = model.optional("ds_config", dict) or {}
        self._is_data_first = bool(config.get("use_data_before_expert_parallelism", False))
        self.layers = autoep_layers(model)

    def layer_of(self, name: str) -> AutoEPLayer | None:
        """The AutoEP layer whose expert parameter this is."""
        return layer_of(self.layers, name)

    def ranks(self, rank: int, partition_count: int) -> tuple[int, int]:
        """(expert-parallel rank, partition) of a rank, for a parameter that is cut into so many partitions."""
        if partition_count < 1 or self._world_size % partition_count:
            raise CheckpointError(
                f"{self._model.where}: {partition_count} partitions over {self._world_size} ranks do not go up"
            )
        expert_parallel_size = self._world_size // partition_count
        if self._is_data_first:
            return divmod(rank, partition_count)
        partition, expert_rank = divmod(rank, expert_parallel_size)
        return expert_rank, partition

    def place(self, name: str, shape: Shape, expert_rank: int, num_local_experts: int) -> Placed:
        """Where an expert parameter, as one rank calls it, belongs. Raises CheckpointError on an unknown kind of MoE."""
        if layer := self.layer_of(name):
            return layer.place(name, shape, expert_rank, self._model)
        match = STOCK_EXPERT.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{self._model.where}: {name} is in an expert-parallel group, but is neither of a deepspeed.moe.layer.MoE "
                f"nor of a layer in ds_autoep_layers"
            )
        expert = expert_rank * num_local_experts + int(match["expert"])
        return Placed(stock_name(match["layer"], expert, match["parameter"]), shape, 0)


def layer_of(layers: Sequence[AutoEPLayer], name: str) -> AutoEPLayer | None:
    """The one of these layers whose expert parameter this is."""
    return next((layer for layer in layers if name.startswith(f"{layer.prefix}.")), None)


def stock_name(layer: str, expert: int, parameter: str) -> str:
    """DeepSpeed's name of a parameter of an expert, counted over all ranks."""
    return f"{layer}.deepspeed_moe.experts.deepspeed_experts.{expert}.{parameter}"


def stock_local_experts(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Number of experts that a rank held, by stock MoE layer, out of its parameters' names."""
    found: dict[str, int] = {}
    for name in shapes:
        if match := STOCK_EXPERT.fullmatch(name):
            found[match["layer"]] = max(found.get(match["layer"], 0), int(match["expert"]) + 1)
    return found


def autoep_layers(model: Record) -> tuple[AutoEPLayer, ...]:
    """The AutoEP layers that a model file tells of. Raises CheckpointError on a placement that is not uniform."""
    key = "ds_autoep_layers" if model.data.get("ds_autoep_layers") is not None else "autoep_layers"
    return tuple(_autoep_layer(Record(entry, model.where)) for entry in model.optional(key, list) or [])


def _autoep_layer(entry: Record) -> AutoEPLayer:
    layer = AutoEPLayer(
        prefix=entry.get("expert_key_prefix", str),
        num_experts=entry.get("num_experts", int),
        num_local_experts=entry.get("num_local_experts", int),
        expert_rank=entry.get("ep_rank", int),
    )
    if layer.num_local_experts * entry.get("ep_size", int) != layer.num_experts:
        raise CheckpointError(f"{entry.where}: {layer.prefix}: experts are spread unevenly, which is not supported")
    placement: Any = entry.optional("expert_placement", dict)
    for one in (placement or {}).get("ranks", []):
        first = one["rank"] * layer.num_local_experts
        if list(one["experts"]) != list(range(first, first + layer.num_local_experts)):
            raise CheckpointError(
                f"{entry.where}: {layer.prefix}: rank {one['rank']} held experts {one['experts']}, allowed are "
                f"consecutive ones in the order of the ranks"
            )
    return layer
