"""Filling a model built on meta tensors: each process reads the dense part and its own experts, and nothing else.

A sparse model can be filled from a dense one: its experts are then cut from the dense FFNs as they are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lvlm.connectors.routers import ConnectorRouter
from moe_lvlm.connectors.task_experts import TaskExpertsLayer
from moe_lvlm.connectors.upcycle import dense_name
from moe_lvlm.moe.decoder import FAMILIES, MoEDecoderLayer
from moe_lvlm.moe.ffn import FFNLayout, cut_experts
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.moe.types import ExpertSlice
from moe_lvlm.routing.router import Router


class WeightSource(Protocol):
    """Named tensors that can be read by rows of their first dimension (`moe_lvlm.checkpoint.open_source`)."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor: ...


def expert_slice(parameter: Tensor) -> ExpertSlice | None:
    """Which experts a parameter holds if it holds some of them only (expert parallelism), else None."""
    return getattr(parameter, "expert_slice", None)


def replace_parameter(module: nn.Module, name: str, data: Tensor) -> None:
    """Put `data` in the place of a parameter, with its gradient flag and the marks that others left on it."""
    old = module._parameters[name]
    assert old is not None
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    module._parameters[name] = new


def ffn_layout(layer: MoEDecoderLayer) -> FFNLayout:
    """How the dense FFN was laid out from which a sparse decoder layer's experts are cut."""
    return next(family.ffn for family in FAMILIES if family.moe is type(layer))


def draw_router(router: Router | ConnectorRouter, seed: int) -> None:
    """Draw a router's parameters anew from a seed, as all upcycling from files does; the global generator stays as it is.

    seed: the model's router seed plus the layer's index.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router.reset_parameters()


def load_weights(
    model: PreTrainedModel,
    source: WeightSource,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    router_seed: int = 0,
    new: Collection[str] = (),
) -> None:
    """Fill every parameter and persistent buffer of `model` from `source`.

    router_seed: where the routers start when the source is dense and has none; the same on every rank.
    new: names of parameters that the source has not; they get memory, and the caller gives them their values.

    Raises:
        ValueError: a tensor that is missing, has another shape, or that the model has no place for. Nothing is left
            at random.
    """
    reader = _Reader(model, source, torch.device(device), dtype)
    reader.make_room(new)
    reader.fill_sparse_layers(router_seed)
    reader.fill_rest()
    reader.check_nothing_is_left()
    model.tie_weights()


def fill_from(module: nn.Module, source: WeightSource, *, keep: tuple[str, ...] = ()) -> None:
    """Fill a part of a model from the tensors of the same names in a source that may hold more.

    keep: beginnings of names that stay as they are.

    Raises:
        ValueError: a tensor that is missing, or has another shape.
    """
    available = frozenset(source.names())
    for owner, child in module.named_modules():
        prefix = f"{owner}." if owner else ""
        for leaf, parameter in list(child.named_parameters(recurse=False)):
            name = f"{prefix}{leaf}"
            if name.startswith(keep):
                continue
            if name not in available:
                raise ValueError(f"{name}: not among the {len(available)} tensors of the source")
            data = source.read(name)
            if data.shape != parameter.shape:
                raise ValueError(
                    f"{name}: shape {tuple(data.shape)} in the source; the model needs {tuple(parameter.shape)}"
                )
            replace_parameter(child, leaf, data.clone())


class _Reader:
    """One filling of one model; keeps account of what was read."""

    def __init__(self, model: PreTrainedModel, source: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.source, self.device, self.dtype = model, source, device, dtype
        self.available = frozenset(source.names())
        self.tied = dict(model.all_tied_weights_keys or {})
        self.read_names: set[str] = set()
        self.filled: set[str] = set()

    def make_room(self, names: Collection[str]) -> None:
        """Memory for parameters that are not read."""
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            shape = module.get_parameter(leaf).shape
            replace_parameter(module, leaf, torch.empty(shape, device=self.device, dtype=self.dtype))
            self.filled.add(name)

    def _read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        if name not in self.available:
            raise ValueError(f"{name}: not among the {len(self.available)} tensors of the source")
        self.read_names.add(name)
        return self.source.read(name, start, stop)

    def _set(self, prefix: str, module: nn.Module, leaf: str, data: Tensor) -> None:
        name = f"{prefix}{leaf}"
        expected = tuple(module.get_parameter(leaf).shape)
        if tuple(data.shape) != expected:
            raise ValueError(f"{name}: shape {tuple(data.shape)} in the source; the model needs {expected}")
        replace_parameter(module, leaf, data.to(device=self.device, dtype=self.dtype).contiguous())
        self.filled.add(name)

    def fill_sparse_layers(self, router_seed: int) -> None:
        """MoE layers whose experts the source does not have: cut them from its dense FFNs."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, MoEDecoderLayer) and f"{name}.mlp.experts.w1" not in self.available:
                self._upcycle(f"{name}.mlp.", layer.mlp, ffn_layout(layer), router_seed)
            elif isinstance(layer, TaskExpertsLayer) and not self._has_any(f"{name}.experts."):
                self._copy_query_ffn(f"{name}.", layer, router_seed)

    def _has_any(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.available)

    def _copy_query_ffn(self, prefix: str, layer: TaskExpertsLayer, router_seed: int) -> None:
        """Experts that begin as the query FFN of a plain Q-Former's layer."""
        for owner, module in list(layer.named_modules()):
            for leaf, _ in list(module.named_parameters(recurse=False)):
                name = f"{prefix}{owner}.{leaf}"
                if (dense := dense_name(name)) is not None:
                    self._set(f"{prefix}{owner}.", module, leaf, self._read(dense))
        self._start_router(prefix, layer.router, router_seed + layer.layer_idx)

    def _upcycle(self, prefix: str, moe: MoELayer, layout: FFNLayout, router_seed: int) -> None:
        num_experts = moe.router.num_experts
        dense_width = self.source.shape(f"{prefix}{layout.down}.weight")[1]
        fine_grained = dense_width // moe.experts.w2.shape[2]
        for leaf, parameter in list(moe.experts.named_parameters()):
            held = expert_slice(parameter) or ExpertSlice(0, num_experts, num_experts)
            data = cut_experts(
                leaf,
                lambda dense: self._read(f"{prefix}{dense}"),
                layout,
                start=held.start,
                stop=held.stop,
                fine_grained=fine_grained,
            )
            self._set(f"{prefix}experts.", moe.experts, leaf, data)
        for index, shared in enumerate(moe.shared_experts or ()):
            for leaf, _ in list(shared.named_parameters()):
                owner, _, last = leaf.rpartition(".")
                self._set(
                    f"{prefix}shared_experts.{index}.{owner}.",
                    shared.get_submodule(owner),
                    last,
                    self._read(f"{prefix}{leaf}"),
                )
        self._start_router(prefix, moe.router, router_seed + moe.site.layer)

    def _start_router(self, prefix: str, router: Router | ConnectorRouter, seed: int) -> None:
        for name, module in router.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                replace_parameter(module, leaf, torch.empty(parameter.shape, device=self.device))
                self.filled.add(".".join(part for part in (f"{prefix}router", name, leaf) if part))
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[leaf] = torch.empty_like(buffer, device=self.device)
                self.filled.add(".".join(part for part in (f"{prefix}router", name, leaf) if part))
        draw_router(router, seed)
        router.to(self.dtype)

    def fill_rest(self) -> None:
        """Everything that is read under its own name."""
        for owner, module in list(self.model.named_modules()):
            prefix = f"{owner}." if owner else ""
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = f"{prefix}{leaf}"
                if name in self.filled or name in self.tied:
                    continue
                held = expert_slice(parameter)
                rows = (held.start, held.stop) if held is not None else (None, None)
                self._set(prefix, module, leaf, self._read(name, *rows))
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                if f"{prefix}{leaf}" in self.filled:
                    continue
                if leaf in module._non_persistent_buffers_set:
                    module._buffers[leaf] = buffer.to(self.device)
                else:
                    module._buffers[leaf] = self._read(f"{prefix}{leaf}").to(self.device)

    def check_nothing_is_left(self) -> None:
        left = sorted(self.available - self.read_names - self.tied.keys())
        if left:
            raise ValueError(
                f"{len(left)} tensors of the source have no place in {type(self.model).__name__}: {', '.join(left[:5])}"
            )
