"""Weights that are not trained, and buffers: from the model's file, and from the experts' own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_lvlm.checkpoint.deepspeed_import.collected import Collected
from moe_lvlm.checkpoint.deepspeed_import.contents import Contents
from moe_lvlm.checkpoint.deepspeed_import.placement import ExpertPlacement
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record, TorchFolder, flat
from moe_lvlm.checkpoint.layout import CheckpointError

_AUTOEP_EXPERT = re.compile(r"(?P<name>.+\.w[123])\.(?P<expert>\d+)")


def read_buffers(model: Record, collected: Collected) -> None:
    """Add the buffers that belong to the model's state."""
    module = model.get("module", dict)
    for name in model.get("buffer_names", list):
        if name not in module:
            raise CheckpointError(f"{model.where}: has no buffer {name!r}, which its buffer_names names")
        _add_whole(str(name), module[name], model, collected)


def read_frozen(model: Record, trained: set[str], placement: ExpertPlacement, collected: Collected) -> None:
    """Add the weights of a whole model that are neither trained nor another name of one that is added (ZeRO 0 to 2)."""
    module = model.get("module", dict)
    buffers = set(model.get("buffer_names", list))
    aliases = aliases_of(model, module)
    for name, tensor in module.items():
        if name in trained or name in buffers or name in aliases:
            continue
        if not isinstance(tensor, Tensor):
            collected.note(f"{name}: extra state of a module, a {type(tensor).__name__}, was left out")
            continue
        layer = placement.layer_of(name)
        if layer is not None and layer.num_local_experts != layer.num_experts:
            raise CheckpointError(
                f"{model.where}: {name}: frozen under expert parallelism; DeepSpeed stored {layer.num_local_experts} of "
                f"{layer.num_experts} experts only, the others are lost"
            )
        _add_whole(name, tensor, model, collected)


def read_frozen_experts(
    folder: TorchFolder, contents: Contents, placement: ExpertPlacement, collected: Collected
) -> None:
    """Add the weights of experts that are not trained, each in a file of its own (ZeRO 1 and 2).

    Comes after the masters: what has one is trained.
    """
    trained = set(collected.tensors)
    for _, file in sorted(contents.experts.items()):
        record = folder.record(file)
        for name, tensor in record.data.items():
            match = _AUTOEP_EXPERT.fullmatch(str(name))
            if (str(name) if match is None else match["name"]) not in trained:
                _add_expert(str(name), tensor, record, placement, collected)


def aliases_of(model: Record, module: Mapping[str, Any]) -> set[str]:
    """Names of parameters that share their tensor with one of an earlier name.

    DeepSpeed stores them for ZeRO, but for two names in one module; torch's files keep what is shared, but not those of
    MoE models, whose tensors DeepSpeed copies before.
    """
    # DeepSpeed compares addresses, which empty tensors share without being one
    stored = model.optional("shared_params", dict) or {}
    aliases = {name for name in stored if not isinstance(module.get(name), Tensor) or module[name].numel()}
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in module.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if identity in seen:
                aliases.add(name)
            seen.add(identity)
    return aliases


def _add_expert(name: str, tensor: Any, record: Record, placement: ExpertPlacement, collected: Collected) -> None:
    values = flat(tensor, f"{record.where}: {name}")
    match = _AUTOEP_EXPERT.fullmatch(name)
    layer = None if match is None else placement.layer_of(match["name"])
    if match is None or layer is None:
        collected.add(name, "weight", shape=tuple(tensor.shape), values=values)
        return
    shape = (layer.num_experts, *tensor.shape)
    collected.add(match["name"], "weight", shape=shape, values=values, start=int(match["expert"]) * values.numel())


def _add_whole(name: str, tensor: Any, record: Record, collected: Collected) -> None:
    values = flat(tensor, f"{record.where}: module: {name}")
    collected.add(name, "weight", shape=tuple(tensor.shape), values=values)
