"""A dense model of ours becomes a mixture of experts on the disk: what `load_weights` makes of it while loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.config.load import RecipeError, did_you_mean
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.yaml_text import parse_yaml
from moe_lvlm.conversion.folder import Converted, open_model
from moe_lvlm.conversion.target import LastRead, build_target
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.weights import draw_router, ffn_layout
from moe_lvlm.moe.decoder import MoEDecoderLayer
from moe_lvlm.moe.ffn import FFNLayout, cut_experts, dense_names
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.build import build_router


def read_moe_settings(overrides: Sequence[str]) -> MoEConfig:
    """The defaults with `key=value` overrides, as those of a recipe's `moe` (`num_experts=8`, `router.kind=ltdr`).

    Raises:
        RecipeError: every key that is not known and every value that is not allowed.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, leaf = key.strip().split(".")
        if not equals or not all((*parents, leaf)):
            raise RecipeError(f"override {override!r}: write key=value, such as num_experts=8 or router.kind=ltdr")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise RecipeError(f"override {override!r}: {parent} is {node!r}, it has no keys")
        try:
            node[leaf] = parse_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {override!r}: the value is not YAML") from error
    if isinstance(router := data.get("router"), dict):
        router.setdefault("kind", "top_k")
    try:
        return MoEConfig.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_problem(item) for item in error.errors(include_url=False))) from error


def _problem(item: Any) -> str:
    key = ".".join(map(str, item["loc"])) or "moe"
    if item["type"] == "extra_forbidden":
        allowed = list(MoEConfig.model_fields) if len(item["loc"]) == 1 else []
        return f"{key}: unknown key{did_you_mean(key, allowed)}" + (
            f"; allowed: {', '.join(allowed)}" if allowed else ""
        )
    return f"{key}: {item['input']!r}: {item['msg'].removeprefix('Value error, ')}"


def upcycle_folder(path: str | Path, moe: MoEConfig, *, router_seed: int) -> Converted:
    """A dense run, checkpoint or model folder, or transformers' LLaVA, as a sparse model.

    Raises:
        ValueError: a model that is sparse already, or whose layers cannot become sparse.
    """
    opened = open_model(path)
    config, weights = upcycle_weights(opened.config, opened.weights, moe, router_seed=router_seed)
    return Converted(config=config, weights=weights, processor=opened.processor, before=opened.config.to_dict())


def upcycle_weights(
    config: MoELlavaConfig, source: WeightSource, moe: MoEConfig, *, router_seed: int
) -> tuple[MoELlavaConfig, LazySource]:
    """Experts and shared experts cut from the dense FFNs, in their type; routers drawn in float32, layer i from
    `router_seed` + i.

    Raises:
        ValueError: the model is sparse already, its layers cannot become sparse, its weights are not as it says, or
            the routers start from data.
    """
    if config.moe is not None:
        raise ValueError(f"the model has {config.moe['num_experts']} experts already; allowed: a dense one")
    if moe.router.kind == "cluster":
        raise ValueError(
            "router.kind: cluster starts at the centres of data.clusters, which a conversion does not have; allowed: a "
            "stage of a recipe with upcycle: true"
        )
    sparse = config.with_moe(moe)
    target = build_target(sparse)
    layers = {
        f"{name}.mlp.": layer for name, layer in target.model.named_modules() if isinstance(layer, MoEDecoderLayer)
    }
    tensors = target.adopt(source, (), is_wanted=lambda name: not name.startswith(tuple(layers)), own_rules=())
    last = LastRead()
    for prefix, layer in layers.items():
        tensors |= _expert_tensors(prefix, layer.mlp, ffn_layout(layer), source, moe, last)
        tensors |= _router_tensors(prefix, layer.mlp, sparse, router_seed)
    return sparse, target.complete(tensors)


def _expert_tensors(
    prefix: str, layer: MoELayer, layout: FFNLayout, source: WeightSource, moe: MoEConfig, last: LastRead
) -> dict[str, LazyTensor]:
    """The stacks, and the shared experts, which are the dense FFN as it is."""
    available = frozenset(source.names())
    found = {}
    for leaf, _ in layer.experts.named_parameters():
        name = f"{prefix}{dense_names(leaf, layout)}"
        if name not in available:
            raise ValueError(f"{name}: not among the {len(available)} tensors of the source")
        found[f"{prefix}experts.{leaf}"] = _stack(leaf, prefix, layout, source, moe, last)
    for index, shared in enumerate(layer.shared_experts or ()):
        for leaf, _ in shared.named_parameters():
            found[f"{prefix}shared_experts.{index}.{leaf}"] = LazyTensor.from_source(source, f"{prefix}{leaf}")
    return found


def _stack(
    leaf: str, prefix: str, layout: FFNLayout, source: WeightSource, moe: MoEConfig, last: LastRead
) -> LazyTensor:
    """All experts' matrices (or biases) of one name."""
    fine_grained = moe.fine_grained
    name = f"{prefix}{dense_names(leaf, layout)}"
    shape = list(source.shape(name))
    if leaf == "w2":
        shape[1] //= fine_grained
    elif leaf != "b2":
        shape[0] //= fine_grained * (2 if layout.fused_gate_up else 1)

    def read_dense(dense: str) -> Tensor:
        return last(f"{prefix}{dense}", lambda: source.read(f"{prefix}{dense}"))

    def read(start: int, stop: int) -> Tensor:
        return cut_experts(leaf, read_dense, layout, start=start, stop=stop, fine_grained=fine_grained)

    return LazyTensor(shape=(moe.num_experts, *shape), dtype=source.dtype(name), read=read)


def _router_tensors(prefix: str, layer: MoELayer, config: MoELlavaConfig, router_seed: int) -> dict[str, LazyTensor]:
    assert config.moe_config is not None
    with torch.random.fork_rng(devices=[]):  # building one draws from the global generator
        router = build_router(model_width=config.text_config.hidden_size, config=config.moe_config)
    draw_router(router, router_seed + layer.site.layer)
    return {f"{prefix}router.{name}": LazyTensor.of(tensor) for name, tensor in router.state_dict().items()}
