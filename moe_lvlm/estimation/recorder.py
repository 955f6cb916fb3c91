"""What a forward and a backward pass over fake tensors cost: FLOPs, bytes that autograd keeps, and working memory.

Fake tensors have a shape and a type and no memory, so a model of any size runs here; what torch and transformers really do
is counted, and no formula of theirs is repeated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SHARED = -1
"""The `layer` of what belongs to no layer: embeddings, masks, rotary angles, the last norm."""


class Region(NamedTuple):
    """A place in a model. part: tower, connector, language_model, head. layer: its index, or SHARED. kind: attention,
    dense_ffn, experts, shared_experts, router, adapters, other."""

    part: str
    layer: int
    kind: str


@dataclass(slots=True)
class Work:
    """What a region does in one direction.

    products: floating-point operations (a multiply and an add are 2) that grow with the number of tokens. pairs: those of
    attention, which grow with its pairs. product_bytes: that products read and write. moved: bytes that all else reads and
    writes. launches: operations that a GPU is told of one by one.
    """

    products: float = 0.0
    pairs: float = 0.0
    product_bytes: float = 0.0
    moved: float = 0.0
    launches: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Work)))


@dataclass(slots=True)
class Cost:
    """Of one region. saved: bytes kept for the backward pass that no earlier region keeps."""

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    saved: int = 0


@dataclass(slots=True)
class _Storage:
    bytes: int
    is_saved: bool
    alive: weakref.ref[torch.UntypedStorage]


@dataclass(slots=True)
class Recorder:
    """One forward and backward pass. Enter `saved_tensors_hooks(recorder.pack, recorder.unpack)` around it, and a
    `Counting` mode.

    region: where the pass is now; modules' hooks set it in the forward pass, saved tensors bring it back in the backward
    pass. sequence: positions of a row, by which products over pairs of them are known.
    costs: by region. working: the most bytes that lived at one moment besides what was saved and what was there before.
    """

    region: Region
    sequence: int
    ignored: frozenset[int]
    costs: dict[Region, Cost] = field(default_factory=dict)
    shared: dict[int, Region] = field(default_factory=dict)
    working: int = 0
    is_backward: bool = False
    _storages: dict[int, _Storage] = field(default_factory=dict)
    _live: int = 0
    _live_saved: int = 0

    def cost(self, region: Region | None = None) -> Cost:
        return self.costs.setdefault(region or self.region, Cost())

    def share(self, values: object) -> None:
        """Tensors that all layers get: whoever saves them first, they belong to none."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                key = tensor.untyped_storage()._cdata
                self.shared.setdefault(key, self.region._replace(layer=SHARED, kind="other"))

    def pack(self, tensor: Tensor) -> tuple[Tensor, Region]:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.ignored:
            known = self._know(storage)
            if not known.is_saved:
                known.is_saved = True
                self._live_saved += known.bytes
                self.cost(self.shared.get(key)).saved += known.bytes
        return tensor, self.region

    def unpack(self, packed: tuple[Tensor, Region]) -> Tensor:
        tensor, self.region = packed
        return tensor

    def see(self, result: object) -> None:
        """The result of an operation: its memory lives from now on."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.ignored:
                    self._know(storage)
        self.working = max(self.working, self._live - self._live_saved)

    def _know(self, storage: torch.UntypedStorage) -> _Storage:
        key = storage._cdata
        known = self._storages.get(key)
        if known is None or known.alive() is not storage:
            alive = weakref.ref(storage, lambda _, key=key: self._forget(key))  # type: ignore[misc]
            known = self._storages[key] = _Storage(storage.nbytes(), False, alive)
            self._live += known.bytes
        return known

    def _forget(self, key: int) -> None:
        known = self._storages.pop(key)
        self._live -= known.bytes
        if known.is_saved:
            self._live_saved -= known.bytes


class Counting(TorchDispatchMode):
    """Tells a recorder of every operation."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        recorder = self.recorder
        cost = recorder.cost()
        _count(cost.backward if recorder.is_backward else cost.forward, func, args, kwargs, result, recorder.sequence)
        recorder.see(result)
        return result


def _count(
    work: Work, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object, sequence: int
) -> None:
    """Add an operation to a region's work."""
    namespace, _, name = func._overloadpacket._qualified_op_name.partition("::")
    name = name.rstrip("_")
    if func.is_view or namespace == "prim" or name in _FREE:
        return
    work.launches += 1
    num_bytes = _num_bytes(args) + _num_bytes(list(kwargs.values())) + _num_bytes(result)
    if "scaled_dot_product" in name:
        work.pairs += _attention_flops(args, is_backward="backward" in name)
        work.product_bytes += num_bytes
    elif (count := _FLOPS.get(name)) is not None:
        flops = count(*args, **kwargs, out_val=result)
        if name in _BATCHED and _is_paired(args, sequence):
            work.pairs += flops
        else:
            work.products += flops
        work.product_bytes += num_bytes
    else:
        work.moved += num_bytes


def _num_bytes(values: object) -> int:
    return sum(one.numel() * one.element_size() for one in tree_leaves(values) if isinstance(one, Tensor))


_FLOPS: Mapping[str, Callable[..., float]] = {
    packet._qualified_op_name.removeprefix("aten::"): count
    for packet, count in flop_registry.items()
    if isinstance(packet, torch._ops.OpOverloadPacket)
}
_BATCHED = frozenset({"bmm", "baddbmm"})
_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_FREE = frozenset({*_EMPTY, "detach", "lift_fresh", "unsafe_view", "_unsafe_view", "promote_types"})


def _attention_flops(args: tuple[Any, ...], *, is_backward: bool) -> float:
    """Of fused attention over all pairs: two products forward; four backward, the repeated one left out."""
    query, key, value = args[1:4] if is_backward else args[:3]
    batch, heads, queries, width = query.shape
    products = 2.0 * batch * heads * queries * key.shape[2] * (width + value.shape[3])
    return 2 * products if is_backward else products


def _is_paired(args: tuple[Any, ...], sequence: int) -> bool:
    """Whether a batched product has the sequence in two of its three dimensions, as attention's have."""
    left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
    return (*left.shape[1:], right.shape[-1]).count(sequence) >= 2
