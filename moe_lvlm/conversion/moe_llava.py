"""MoE-LLaVA's released checkpoints become sparse models of ours.

Their layout: a flat configuration with LLaVA's keys and a section `moe`; `model.layers.N.mlp.deepspeed_moe.gate.wg`
[E, D], as our gate is; `model.layers.N.mlp.deepspeed_moe.experts.deepspeed_experts.E.` with a dense FFN each, in the
order of the gate's rows; `model.mm_projector.image_spatial_proj.{0,2}`; `model.image_tower.image_tower...`, or the tower
elsewhere. `original.py` says what becomes of the image token.

Routing is DeepSpeed's: softmax over all experts; of two chosen the weights are divided by their sum
(`router.renormalize: true`), a single one keeps its probability (`top1_weight: probability`). Experts there have a
capacity and drop tokens beyond it, in evaluation too, and the second expert is drawn with Gumbel noise. By default no
token is dropped and the second expert is the second best, so logits equal theirs only where no token is dropped and no
draw changes a choice. `has_released_routing` keeps the capacity, and the noise in training (theirs is drawn at
evaluation too).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lvlm.checkpoint.source import LazySource, LazyTensor, WeightSource
from moe_lvlm.config.moe import BalanceSettings, MoEConfig, TopKRouterSettings
from moe_lvlm.conversion.folder import Converted
from moe_lvlm.conversion.llava import preprocessing_notes
from moe_lvlm.conversion.original import OriginalModel, OriginalOptions, open_original, text_config_dict
from moe_lvlm.conversion.target import LastRead, build_target
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.weights import ffn_layout
from moe_lvlm.moe.decoder import MoEDecoderLayer
from moe_lvlm.moe.ffn import FFNLayout, cut_experts, dense_names

FAMILIES = {
    "moe_llava_llama": "llama",
    "moe_llava_mistral": "mistral",
    "moe_llava_phi": "phi",
    "moe_llava_qwen": "qwen2",
    "moe_llava_stablelm": "stablelm",
}
_RENAMES = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
_MOE = ".mlp.deepspeed_moe."
# What a converted model does otherwise than theirs, by whether it has the released routing
NOTES = {
    False: (
        "MoE-LLaVA drops tokens beyond an expert's capacity, in evaluation too; here none is (--released-routing drops)",
        "the second expert is the second best; MoE-LLaVA draws it with Gumbel noise (--released-routing: in training)",
    ),
    True: ("the second expert is drawn with Gumbel noise in training only; MoE-LLaVA's is at evaluation too",),
}


def from_moe_llava(path: str | Path, options: OriginalOptions, *, has_released_routing: bool = False) -> Converted:
    """A released checkpoint of MoE-LLaVA as our sparse model.

    has_released_routing: with the capacity that its configuration names, and noise on the second choice in training.

    Raises:
        ValueError: another layout, an unknown family (Qwen-1 among them), residual experts, or layers with different
            numbers of experts.
    """
    folder = resolve(path)
    original = open_original(
        folder,
        families=FAMILIES,
        tower_key="mm_image_tower",
        projector_keys=("image_projector_type", "mm_projector_type"),
        renames=_RENAMES,
        options=options,
    )
    if any(name.startswith("transformer.h.") for name in original.source.names()):
        raise ValueError(
            f"{folder}: a Qwen-1 language model, which transformers does not have; allowed: Qwen1.5 and later"
        )
    moe = moe_settings(folder, original.fields.get("moe"), has_released_routing=has_released_routing)
    config, processor = original.build_config()
    config, weights = moe_llava_weights(config, original, moe)
    return Converted(
        config=config,
        weights=weights,
        processor=processor,
        before={"text_config": text_config_dict(original.text)},
        notes=(*NOTES[has_released_routing], *preprocessing_notes(original)),
    )


def moe_settings(folder: Path, section: Any, *, has_released_routing: bool = False) -> MoEConfig:
    """Our settings for a section `moe` of theirs.

    Raises:
        ValueError: it is missing, or says what our layers do not do.
    """
    if not isinstance(section, dict) or not section.get("moe_enable", True):
        raise ValueError(f"{folder}: no mixture of experts in its configuration (moe): a dense one is for `llava`")
    if section.get("use_residual"):
        raise ValueError(f"{folder}: moe.use_residual: experts beside a weighted dense FFN are not supported")
    counts, layers, top_k = (section.get(key) for key in ("num_experts", "moe_layers_idx", "top_k_experts"))
    if not layers or not counts or top_k is None:
        raise ValueError(f"{folder}: moe: moe_layers_idx, num_experts and top_k_experts are needed, it has {section}")
    if len(set(counts)) != 1:
        raise ValueError(f"{folder}: moe.num_experts: {counts}; allowed: the same number in every layer")
    released: dict[str, Any] = {}
    if has_released_routing:
        # their defaults, where a configuration leaves the keys out
        released["capacity_factor"] = section.get("capacity_factor", 1.5)
        released["eval_capacity_factor"] = section.get("eval_capacity_factor", 2.0)
    return MoEConfig(
        layers=tuple(layers),
        num_experts=counts[0],
        top_k=top_k,
        router=TopKRouterSettings(
            renormalize=True,
            top1_weight="probability",
            second_choice_noise="gumbel" if has_released_routing and top_k == 2 else "none",
        ),
        balance=BalanceSettings(
            coefficient=section.get("router_aux_loss_coef", 0.01), fraction="top1" if top_k <= 2 else "all_choices"
        ),
        **released,
    )


def moe_llava_weights(
    config: MoELlavaConfig, original: OriginalModel, moe: MoEConfig
) -> tuple[MoELlavaConfig, LazySource]:
    """Stacks of their experts, their gates, and the rest, under our names."""
    sparse = config.with_moe(moe)
    target = build_target(sparse)
    tensors = original.tensors(target, is_wanted=lambda name: _MOE not in name)
    last = LastRead()
    taken = set()
    for name, layer in target.model.named_modules():
        if isinstance(layer, MoEDecoderLayer):
            theirs = f"model.layers.{layer.mlp.site.layer}{_MOE}"
            found = _layer_tensors(theirs, f"{name}.mlp.", layer, original.source, moe.num_experts, last)
            tensors |= found
            taken |= set(_names_of_layer(theirs, layer, moe.num_experts))
    left = sorted(name for name in original.source.names() if _MOE in name and name not in taken)
    if left:
        raise ValueError(f"{original.folder}: {len(left)} expert tensors have no place: {', '.join(left[:5])}")
    return sparse, target.complete(tensors)


def _names_of_layer(theirs: str, layer: MoEDecoderLayer, num_experts: int) -> list[str]:
    layout = ffn_layout(layer)
    leaves = {dense_names(leaf, layout) for leaf, _ in layer.mlp.experts.named_parameters()}
    experts = [f"{_expert(theirs, index)}{leaf}" for index in range(num_experts) for leaf in sorted(leaves)]
    return [f"{theirs}gate.wg.weight", *experts]


def _layer_tensors(
    theirs: str, ours: str, layer: MoEDecoderLayer, source: WeightSource, num_experts: int, last: LastRead
) -> dict[str, LazyTensor]:
    """One layer's gate and stacks.

    Raises:
        ValueError: an expert, one of its matrices or the gate is missing, or experts have different shapes.
    """
    available = frozenset(source.names())
    missing = [name for name in _names_of_layer(theirs, layer, num_experts) if name not in available]
    if missing:
        raise ValueError(f"{missing[0]}: not in the source ({len(missing)} tensors of this layer are missing)")
    layout = ffn_layout(layer)
    gate = LazyTensor.from_source(source, f"{theirs}gate.wg.weight")
    found = {f"{ours}router.gate.weight": gate}
    for leaf, _ in layer.mlp.experts.named_parameters():
        dense = dense_names(leaf, layout)
        names = [f"{_expert(theirs, expert)}{dense}" for expert in range(num_experts)]
        for name in names:
            if source.shape(name) != source.shape(names[0]):
                raise ValueError(f"{name}: shape {source.shape(name)}, that of expert 0 is {source.shape(names[0])}")
        found[f"{ours}experts.{leaf}"] = _stack(leaf, names, layout, source, last)
    return found


def _stack(leaf: str, names: list[str], layout: FFNLayout, source: WeightSource, last: LastRead) -> LazyTensor:
    """The matrices of all experts below each other."""
    shape = list(source.shape(names[0]))
    if layout.fused_gate_up and leaf[1] in "13":
        shape[0] //= 2

    def read(start: int, stop: int) -> Tensor:
        return torch.cat([_one(names[expert]) for expert in range(start, stop)])

    def _one(name: str) -> Tensor:
        def read_dense(dense: str) -> Tensor:
            return last(name, lambda: source.read(name))

        return cut_experts(leaf, read_dense, layout, start=0, stop=1, fine_grained=1)

    return LazyTensor(shape=(len(names), *shape), dtype=source.dtype(names[0]), read=read)


def _expert(theirs: str, index: int) -> str:
    return f"{theirs}experts.deepspeed_experts.{index}."
