"""Putting adapters into a decoder."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from moe_lvlm.adapters.decoder import adapt_layer, find_base
from moe_lvlm.adapters.linear import AdaptedLinear, LoRAExpertLinear, LoRALinear, reset_table
from moe_lvlm.adapters.stacked import adapt_stack, check_adaptable, stack_names
from moe_lvlm.adapters.table import TABLE
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.types import Site

_REGEX = "re:"
# Between the name of a MoE layer and that of a matrix of its experts
_EXPERTS = ".experts."


def attach(decoder: nn.Module, settings: LoRASettings) -> list[AdaptedLinear]:
    """Adapt the linears, and the stacked matrices of experts, that the settings name, in place; returns the adapters in
    the model's order.

    decoder: the module with `.layers`, dense or with experts. A linear keeps its name, weight and bias, experts keep
    their stacks, and a layer that holds an adapter is replaced by a subclass of its class. What is new is drawn as
    `start_adapters` says, but for `start_from`, which only that reads; the function of the model stays. Nothing is
    frozen or thawed. Works on meta tensors.

    Raises:
        ValueError: adapters are there already, an unknown kind of layer, experts that cannot take adapters, or a target
            that names nothing, or not in every layer.
    """
    layers = decoder._modules.get("layers")
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(decoder).__name__} has no decoder layers at `layers`; allowed: the module that has them"
        )
    if any(isinstance(module, AdaptedLinear) for module in layers.modules()):
        raise ValueError(f"{type(decoder).__name__} holds adapters already")
    for target in settings.target_modules:
        _check_regex(target)
    found = {index: _find(layers[index], index, settings.target_modules) for index in range(len(layers))}
    _check_targets(layers, found, settings.target_modules)
    adapted = sorted({index for index, names in found.items() if names})
    for index in adapted:
        find_base(layers[index])
        for name in found[index]:
            if (moe := _moe_of(layers[index], name)) is not None:
                check_adaptable(moe)
    # Nothing raises from here on: the model changes as a whole or not at all.
    for index in adapted:
        for name in found[index]:
            _adapt(layers[index], name, settings, Site(f"adapter.{name}", index))
        layers[index] = adapt_layer(layers[index])
    adapters = [adapter for _, adapter in adapted_linears(layers)]
    if isinstance(settings, MoCLESettings) and settings.has_shared_table:
        like = adapters[0].lora_A
        table = nn.Embedding(settings.num_clusters, settings.embedding_width, device=like.device, dtype=like.dtype)
        reset_table(table)
        decoder.add_module(TABLE, table)
    return adapters


def adapted_linears(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """Every adapted linear of a model with its name, in the model's order. What adapts a stack of experts stands beside
    it: `mlp.adapters.w1` for `mlp.experts.w1`."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


def _adapt(layer: nn.Module, name: str, settings: LoRASettings, site: Site) -> None:
    """Adapt the linear, or the stack of experts, of this name."""
    if (moe := _moe_of(layer, name)) is not None:
        adapt_stack(moe, name.rpartition(".")[2], settings, site)
        return
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    if isinstance(settings, MoCLESettings):
        layer.set_submodule(name, LoRAExpertLinear(linear, settings, site))
    else:
        layer.set_submodule(name, LoRALinear(linear, settings, site))


def _moe_of(layer: nn.Module, name: str) -> MoELayer | None:
    """The MoE layer whose experts' stack has this name in a decoder layer; None for the name of a linear."""
    owner, is_stack, _ = name.rpartition(_EXPERTS)
    moe = layer.get_submodule(owner) if is_stack else None
    return moe if isinstance(moe, MoELayer) else None


def _matches(target: str, layer: int, name: str) -> bool:
    whole = f"layers.{layer}.{name}"
    if target.startswith(_REGEX):
        return re.fullmatch(target.removeprefix(_REGEX), whole) is not None
    return whole == target or whole.endswith(f".{target}")


def _check_regex(target: str) -> None:
    if target.startswith(_REGEX):
        try:
            re.compile(target.removeprefix(_REGEX))
        except re.error as error:
            raise ValueError(f"adapter.target_modules: {target!r} is no regular expression: {error}") from error


def _names(layer: nn.Module) -> list[str]:
    """What can be adapted in a layer: its linears, and the stacked matrices of its experts."""
    names = []
    for name, module in layer.named_modules():
        if type(module) is nn.Linear:
            names.append(name)
        elif isinstance(module, MoELayer):
            names += [f"{name}{_EXPERTS}{stack}" for stack in stack_names(module)]
    return names


def _find(layer: nn.Module, index: int, targets: Iterable[str]) -> list[str]:
    """Names in the layer of what some target names."""
    return [name for name in _names(layer) if any(_matches(target, index, name) for target in targets)]


def _check_targets(layers: nn.ModuleList, found: dict[int, list[str]], targets: Iterable[str]) -> None:
    """ValueError for a target that names nothing, or not in every layer; stacks of experts, in every sparse layer."""
    there = sorted({name for layer in layers for name in _names(layer)})
    sparse = {index for index, layer in enumerate(layers) if any(isinstance(one, MoELayer) for one in layer.modules())}
    experts = (
        "; where a layer is a mixture of experts, its FFN's linear layers are stacked matrices of mlp.experts (w1, w2, w3)"
        if sparse
        else ""
    )
    for target in targets:
        named = {(index, name) for index, names in found.items() for name in names if _matches(target, index, name)}
        having = {index for index, _ in named}
        are_stacks = all(_moe_of(layers[index], name) is not None for index, name in named)
        if not having:
            raise ValueError(
                f"adapter.target_modules: {target!r} names no linear layer of the decoder's layers; there are "
                f"{', '.join(there)}{experts}"
            )
        is_of_all = not target.startswith((_REGEX, "layers."))
        lacking = sorted((sparse if are_stacks else set(range(len(layers)))) - having)
        if is_of_all and lacking:
            raise ValueError(
                f"adapter.target_modules: {target!r} names no linear layer of decoder layers "
                f"{', '.join(map(str, lacking))}{experts}; allowed: a name that every layer has, or "
                f"'{_REGEX}<regular expression on names such as layers.0.{there[0]}>'"
            )
