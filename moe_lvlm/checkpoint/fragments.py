"""Which elements of which logical tensors live on this rank: one view of a plain model or of any engine.

`live_model` describes a single-process model with a torch optimizer; `engine.live_engine` describes a DeepSpeed
engine. What both give, a `LiveTraining`, is all that saving and restoring know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lvlm.checkpoint.layout import MOMENTS, Kind

_ADAM_STATE = {"step", *MOMENTS}
# DeepSpeed's own Adams count steps in a Python int; known by name, so that this file needs no DeepSpeed
_INTEGER_STEP_OPTIMIZERS = {"DeepSpeedCPUAdam", "FusedAdam"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Elements [start, stop) of a flattened logical tensor, on this rank.

    tensor: 1-D *view* of the live storage: writing into it restores.
    step: the optimizer's count of steps for this parameter, with moments only.
    is_replicated: other ranks may hold the same elements, so that one of them has to be chosen to write them.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    tensor: Tensor
    step: float | None = None
    is_replicated: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + numel) of this rank's flattened parameter, found at `offset` of a flat master."""

    parameter: nn.Parameter
    start: int
    offset: int
    numel: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatGroup:
    """One float32 master tensor that the optimizer steps, and what it is made of.

    master: the key of the optimizer's state. Its elements outside of all pieces are padding.
    parameters: all that the group was made of, on this rank or not.
    options: the optimizer's parameter group (live: lr and the like).
    """

    master: Tensor
    pieces: tuple[Piece, ...]
    parameters: tuple[nn.Parameter, ...]
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LiveTraining:
    """A model in training, as saving and restoring see it.

    optimizer: the torch optimizer whose state belongs to the masters; None if nothing is trained.
    is_partitioned: whether masters are divided among ranks (ZeRO 1 to 3) or whole on each.
    refresh: brings the model's weights, on all ranks, to what the masters say. A collective.
    facts: small JSON data that restoring needs (counters, schedule), and the way to set them again.
    """

    model: nn.Module
    optimizer: Optimizer | None
    groups: tuple[FlatGroup, ...]
    is_partitioned: bool
    refresh: Callable[[], None]
    facts: Callable[[], dict[str, Any]] = dict
    set_facts: Callable[[Mapping[str, Any]], None] = field(default=lambda facts: None)

    def names(self) -> dict[int, str]:
        """Global parameter name by id of the parameter."""
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def fragments(self) -> Iterator[Fragment]:
        """All that lives on this rank: masters and moments of what is trained, weights of what is not, buffers."""
        names = self.names()
        trained: set[int] = set()
        for group in self.groups:
            trained.update(map(id, group.parameters))
            yield from self._group_fragments(group, names)
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in trained:
                yield _frozen_fragment(name, parameter)
        for name, buffer in persistent_buffers(self.model):
            yield _whole(name, "weight", buffer)

    def write_rows(self, rows: Mapping[tuple[str, Kind], Mapping[int, Tensor | None]]) -> None:
        """Overwrite rows (of the first dimension) of logical tensors where this rank holds elements of them.

        rows: by name and kind, the row's values (of the shape of a row, the same on every rank), or None for zeros. A
        tensor that is nowhere, such as a moment before the first step, is passed over. `refresh` comes afterwards.
        """
        for fragment in self.fragments():
            size = math.prod(fragment.shape[1:])
            for row, values in rows.get((fragment.name, fragment.kind), {}).items():
                first, last = max(fragment.start, row * size), min(fragment.stop, (row + 1) * size)
                if first >= last:
                    continue
                target = fragment.tensor[first - fragment.start : last - fragment.start]
                if values is None:
                    target.zero_()
                else:
                    target.copy_(values.reshape(-1)[first - row * size : last - row * size])

    def learning_rates(self) -> dict[str, float]:
        """By parameter name, since groups differ from one topology to the next."""
        names = self.names()
        return {
            names[id(parameter)]: float(group.options["lr"]) for group in self.groups for parameter in group.parameters
        }

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Inverse of `learning_rates`. Raises ValueError if one group of ours would need two of them."""
        names = self.names()
        for group in self.groups:
            found = {rates[name] for parameter in group.parameters if (name := names[id(parameter)]) in rates}
            if len(found) > 1:
                first = names[id(group.parameters[0])]
                raise ValueError(f"the optimizer group of {first} had learning rates {sorted(found)}, one is allowed")
            for rate in found:
                group.options["lr"] = rate

    def _group_fragments(self, group: FlatGroup, names: Mapping[int, str]) -> Iterator[Fragment]:
        state = {} if self.optimizer is None else self.optimizer.state.get(group.master, {})
        _check_state(state, names[id(group.parameters[0])])
        flats: dict[Kind, Tensor] = {"master": group.master.detach()}
        flats.update({kind: state[kind] for kind in MOMENTS if kind in state})
        step = float(state["step"]) if "step" in state else None
        for piece in group.pieces:
            name = names[id(piece.parameter)]
            shape, first = logical_placement(piece.parameter)
            for kind, flat in flats.items():
                yield Fragment(
                    name=name,
                    kind=kind,
                    shape=shape,
                    start=first + piece.start,
                    tensor=flat_view(flat, name).narrow(0, piece.offset, piece.numel),
                    step=step if kind in MOMENTS else None,
                    is_replicated=not self.is_partitioned,
                )


def live_model(model: nn.Module, optimizer: Optimizer | None = None) -> LiveTraining:
    """A model of a single process, whole, with a torch optimizer or none. Raises unless what is trained is float32."""
    return LiveTraining(
        model=model,
        optimizer=optimizer,
        groups=() if optimizer is None else whole_groups(model, optimizer),
        is_partitioned=False,
        refresh=lambda: None,
    )


def whole_groups(model: nn.Module, optimizer: Optimizer) -> tuple[FlatGroup, ...]:
    """One group a parameter: the parameter is its own master (single process, or ZeRO 0 in float32)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for options in optimizer.param_groups:
        for parameter in options["params"]:
            if not parameter.requires_grad or parameter.numel() == 0:
                continue
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"{names[id(parameter)]} is trained in {parameter.dtype} without float32 masters: "
                    f"allowed are float32, or bf16 with ZeRO 1, 2 or 3"
                )
            piece = Piece(parameter, 0, 0, parameter.numel())
            groups.append(FlatGroup(master=parameter, pieces=(piece,), parameters=(parameter,), options=options))
    return tuple(groups)


def create_moments(optimizer: Optimizer, group: FlatGroup, step: float) -> None:
    """Give a master the state that Adam would have made lazily in its first step, at a given count of steps."""
    if group.options.get("amsgrad"):
        raise ValueError("optimizer: amsgrad is set, its third moment is not stored; allowed is amsgrad=False")
    master = group.master
    count: Tensor | int
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
        is_on_device = group.options.get("capturable") or group.options.get("fused")
        count = torch.tensor(step, dtype=torch.float32, device=master.device if is_on_device else "cpu")
    elif type(optimizer).__name__ in _INTEGER_STEP_OPTIMIZERS:
        count = int(step)
    else:
        raise ValueError(f"optimizer {type(optimizer).__name__}: moments can be restored for Adam and AdamW only")
    moments = {kind: torch.zeros_like(master, memory_format=torch.preserve_format).detach() for kind in MOMENTS}
    optimizer.state[master] = {"step": count, **moments}


def logical_placement(parameter: nn.Parameter) -> tuple[tuple[int, ...], int]:
    """Shape of the logical tensor, and where in it (flattened) this rank's parameter begins.

    An expert-parallel parameter carries `expert_slice` with start, stop and total of its rows; ZeRO-3's real shape
    is `ds_shape`.
    """
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    rows = getattr(parameter, "expert_slice", None)
    if rows is None:
        return shape, 0
    if rows.stop - rows.start != shape[0]:
        raise ValueError(f"expert_slice [{rows.start}, {rows.stop}) on a parameter with {shape[0]} rows")
    return (int(rows.total), *shape[1:]), int(rows.start) * math.prod(shape[1:])


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and buffer of each that belongs to the model's state_dict."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def flat_view(tensor: Tensor, name: str) -> Tensor:
    """The tensor as 1-D, sharing storage. Raises ValueError where that cannot be."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()} of shape {tuple(tensor.shape)}, must be contiguous")
    return tensor.detach().view(-1)


def _frozen_fragment(name: str, parameter: Any) -> Fragment:  # ZeRO-3 adds attributes that torch's type lacks
    partition = getattr(parameter, "ds_tensor", None)
    shape, first = logical_placement(parameter)
    if partition is None or math.prod(shape) == 0:
        return _whole(name, "weight", parameter, shape, first)
    # ZeRO-3: equal partitions over the parameter's own group, the last one padded
    size, total = partition.ds_numel, math.prod(parameter.ds_shape)
    start = min(size * torch.distributed.get_rank(parameter.ds_process_group), total)
    numel = min(size, total - start)
    tensor = flat_view(partition, name).narrow(0, 0, numel)
    return Fragment(name=name, kind="weight", shape=shape, start=first + start, tensor=tensor)


def _whole(name: str, kind: Kind, tensor: Tensor, shape: tuple[int, ...] | None = None, first: int = 0) -> Fragment:
    return Fragment(
        name=name,
        kind=kind,
        shape=tuple(tensor.shape) if shape is None else shape,
        start=first,
        tensor=flat_view(tensor, name),
        is_replicated=True,
    )


def _check_state(state: Mapping[str, Any], name: str) -> None:
    if unknown := set(state) - _ADAM_STATE:
        raise ValueError(
            f"optimizer state of {name} has {sorted(unknown)}; Adam and AdamW (without amsgrad) are supported: "
            f"{sorted(_ADAM_STATE)}"
        )
