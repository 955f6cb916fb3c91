"""Which parameters a stage trains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from moe_lvlm.adapters import adapter_parameters
from moe_lvlm.moe.decoder import MoEDecoderLayer
from moe_lvlm.moe.upcycle import moe_layers

# In LLaVA's names and in InstructBLIP's
_PREFIXES = {
    "connector": (
        "model.multi_modal_projector.",
        "model.connector.",
        "query_tokens",
        "qformer.",
        "language_projection.",
    ),
    "vision_tower": ("model.vision_tower.", "vision_model."),
    "language_model": ("model.language_model.", "lm_head.", "language_model."),
}
# What MoE-LLaVA's released code trains in stage III, where its paper says the MoE layers alone: it picks FFNs by a match
# of names, which keeps those of dense layers, and switches the projector on again afterwards.
_RELEASED = ("moe", "dense_ffn", "connector")
PARTS = (*_PREFIXES, "moe", "router", "experts", "dense_ffn", "released", "adapter")


def select_trainable(model: nn.Module, parts: Sequence[str]) -> None:
    """Set `requires_grad` of every parameter: True for those that `parts` name, False for the rest.

    parts: connector, vision_tower, language_model (with its head), moe (routers, experts, shared experts), router,
    experts (with shared experts), dense_ffn (FFNs of the layers that stayed dense), adapter (LoRA, its gates and their
    table), released (moe, dense_ffn and
    connector: what MoE-LLaVA's released code trains in stage III), or `re:<expression>`, searched for in parameter
    names.

    Raises:
        ValueError: an unknown part, no regular expression, or one that names no parameter of this model.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for part in _without_aliases(parts):
        found = _names_of(model, names, part)
        if not found:
            raise ValueError(
                f"train: {part!r} names no parameter of this model (is a stage with upcycle, or with adapt, missing?)"
            )
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def _without_aliases(parts: Iterable[str]) -> list[str]:
    return [name for part in parts for name in (_RELEASED if part == "released" else (part,))]


def _names_of(model: nn.Module, names: Iterable[str], part: str) -> set[str]:
    if part.startswith("re:"):
        try:
            expression = re.compile(part[3:])
        except re.error as error:
            raise ValueError(f"train: {part!r} is no regular expression: {error}") from error
        return {name for name in names if expression.search(name)}
    if part not in PARTS:
        raise ValueError(f"train: unknown part {part!r}; allowed: {', '.join(PARTS)}, re:<expression>")
    if part == "adapter":
        return adapter_parameters(model)
    if part in _PREFIXES:
        prefixes = _PREFIXES[part]
    elif part == "dense_ffn":
        prefixes = _dense_ffns(model)
    else:
        children = {"moe": ("router", "experts", "shared_experts"), "router": ("router",)}.get(
            part, ("experts", "shared_experts")
        )
        prefixes = tuple(f"{layer}.{child}." for layer, _ in moe_layers(model) for child in children)
    return {name for name in names if name.startswith(tuple(prefixes))}


def _dense_ffns(model: nn.Module) -> tuple[str, ...]:
    sparse = {name for name, module in model.named_modules() if isinstance(module, MoEDecoderLayer)}
    layers = (name for name, _ in model.named_modules() if re.fullmatch(r"model\.language_model\.layers\.\d+", name))
    return tuple(f"{name}.mlp." for name in layers if name not in sparse)
