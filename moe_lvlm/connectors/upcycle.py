"""A Q-Former becomes Q-MoE: every expert begins as its layer's query FFN."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerLayer, InstructBlipQFormerModel

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.connectors.routers import ROUTERS
from moe_lvlm.connectors.task_experts import TaskExpertsLayer

_QUERY_FFN = ("intermediate_query", "output_query")
_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
_EXPERT_NAME = re.compile(r"((?:.*\.)?layer\.\d+)\.(?:experts\.\d+|general)\.((?:intermediate_query|output_query)\..+)")


def upcycle_qformer(dense: InstructBlipQFormerModel, settings: ExpertSettings) -> QMoEModel:
    """Q-MoE in the place of a Q-Former, on its device and in its type.

    Experts and the general expert are copies of the layer's query FFN, routers are drawn from torch's generator; all
    other modules are taken over, not copied, so the dense model is not to be used any more. Works on meta tensors.

    Raises:
        ValueError: another kind of model, or more layers with experts than it has layers.
    """
    if type(dense) is not InstructBlipQFormerModel:
        raise ValueError(
            f"{type(dense).__name__} cannot get task experts; allowed: InstructBlipQFormerModel (a BLIP-2 Q-Former has "
            "no text side, which the routers read)"
        )
    with torch.device("meta"):
        model = QMoEModel(dense.config, settings)
    model.embeddings = dense.embeddings
    for index, layer in enumerate(dense.encoder.layer):
        target = model.encoder.layer[index]
        if isinstance(target, TaskExpertsLayer):
            _fill(target, layer)
        else:
            model.encoder.layer[index] = layer
    # transformers installs the hooks that record hidden states once; the parts taken over have them already.
    if getattr(dense, "_output_capturing_hooks_installed", False):
        model._output_capturing_hooks_installed = True
    return model.train(dense.training)


def _fill(target: TaskExpertsLayer, dense: InstructBlipQFormerLayer) -> None:
    """Put a dense layer's parts into a layer that has none yet."""
    for name, child in dense.named_children():
        if name not in _QUERY_FFN:
            setattr(target, name, child)
    for ffn in (*target.experts, *([] if target.general is None else [target.general])):
        for name in _QUERY_FFN:
            setattr(ffn, name, copy.deepcopy(dense.get_submodule(name)))
    like = dense.output_query.dense.weight
    # Drawn on the CPU in float32, so that a seed means the same on every device and in every type.
    router = ROUTERS[target.settings.router](like.shape[0], target.settings.num_experts)
    target.router = router.to(device=like.device, dtype=like.dtype)
    for hooks in _HOOKS:
        getattr(target, hooks).update(getattr(dense, hooks))
    target.gradient_checkpointing = dense.gradient_checkpointing
    if dense.gradient_checkpointing:
        target._gradient_checkpointing_func = dense._gradient_checkpointing_func


def dense_name(name: str) -> str | None:
    """The dense Q-Former's tensor that a task expert's tensor begins as; None for tensors of anything else.

    `encoder.layer.7.experts.2.output_query.dense.bias` begins as `encoder.layer.7.output_query.dense.bias`.
    """
    match = _EXPERT_NAME.fullmatch(name)
    return None if match is None else f"{match[1]}.{match[2]}"


def experts_of(model: nn.Module) -> list[tuple[str, TaskExpertsLayer]]:
    """Every layer with task experts of a model with its name, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TaskExpertsLayer)]
