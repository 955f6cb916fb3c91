"""Sparse upcycling: the FFNs of a dense model become experts, and the model still computes what it did."""

from __future__ import annotations

import copy

from torch import nn

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe.decoder import LayerFamily, MoEDecoderLayer, find_family
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.ffn import copy_dense_into, ffn_shape
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.types import LANGUAGE_MODEL, Site


def build_moe_layer(
    dense: nn.Module, family: LayerFamily, config: MoEConfig, *, site: Site, activation: str
) -> MoELayer:
    """A MoE layer in the shape of a dense decoder layer's FFN, on its device and in its type; the experts and the
    shared experts are copies of it.

    Raises:
        ValueError: `fine_grained` does not divide the FFN's width.
    """
    ffn = dense.get_submodule("mlp")
    model_width, ffn_width, has_bias = ffn_shape(ffn, family.ffn)
    if ffn_width % config.fine_grained:
        raise ValueError(f"fine_grained: {config.fine_grained} does not divide the FFN's width ({ffn_width})")
    experts = Experts(
        num_experts=config.num_experts,
        model_width=model_width,
        ffn_width=ffn_width // config.fine_grained,
        activation=activation,
        is_gated=family.ffn.is_gated,
        has_bias=has_bias,
    )
    router = build_router(model_width=model_width, config=config)
    like = next(ffn.parameters())
    experts.to(device=like.device, dtype=like.dtype)
    router.to(device=like.device, dtype=like.dtype)
    copy_dense_into(experts, ffn, family.ffn, fine_grained=config.fine_grained)
    shared = nn.ModuleList(copy.deepcopy(ffn) for _ in range(config.shared_experts)) if config.shared_experts else None
    return MoELayer(router=router, experts=experts, site=site, shared_experts=shared)


def upcycle_decoder(decoder: nn.Module, config: MoEConfig, *, part: str = LANGUAGE_MODEL) -> list[MoEDecoderLayer]:
    """Replace decoder layers (children of `decoder.layers`) by sparse ones, in place; the new layers are returned.

    The layer object is replaced, never its forward. Works on meta tensors.

    Raises:
        ValueError: an unknown kind of layer, or a layer index that the model does not have.
    """
    layers = decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    sparse = {}
    for index in config.layer_indices(len(layers)):
        family = find_family(layers[index])
        activation = getattr(decoder.config, family.ffn.activation)
        moe = build_moe_layer(layers[index], family, config, site=Site(part, index), activation=activation)
        sparse[index] = family.moe(layers[index], moe)
    # All or none: a layer that cannot become sparse has raised by now, and the model is as it was.
    for index, layer in sparse.items():
        layers[index] = layer
    return list(sparse.values())


def moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """Every MoE layer of a model with its name, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]
