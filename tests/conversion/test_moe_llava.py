"""MoE-LLaVA's layout, against a plain loop over the experts that the test writes into it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import moe_lvlm
from moe_lvlm.conversion.folder import write_converted
from moe_lvlm.conversion.moe_llava import NOTES, from_moe_llava
from moe_lvlm.conversion.original import OriginalOptions
from tests.conversion.layouts import (
    Weights,
    logits,
    original_weights,
    save_bin_shards,
    save_safetensors,
    text_fields,
    tiny_vlm,
    write_tokenizer,
    write_tower,
)
from tests.tiny_models import shake

OPTIONS = OriginalOptions()
LAYERS = (0, 2)
TYPES = {"llama": "llama", "mistral": "mistral", "phi": "phi", "qwen2": "qwen", "stablelm": "stablelm"}
# What StableLM's first configuration called otherwise
OLD_KEYS = {"partial_rotary_factor": "rope_pct", "layer_norm_eps": "norm_eps"}


class LoopMoE(nn.Module):
    """The layer token by token: softmax, the best k, of two the weights over their sum, of one its probability."""

    def __init__(self, gate_ED: Tensor, experts: list[nn.Module], top_k: int) -> None:
        super().__init__()
        self.gate_ED, self.experts, self.top_k = gate_ED, nn.ModuleList(experts), top_k

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for batch in range(x.shape[0]):
            for token in range(x.shape[1]):
                probs = (self.gate_ED @ x[batch, token]).softmax(dim=0).tolist()
                chosen = sorted(range(len(probs)), key=lambda expert: -probs[expert])[: self.top_k]
                total = sum(probs[expert] for expert in chosen) if self.top_k > 1 else 1.0
                for expert in chosen:
                    out[batch, token] += probs[expert] / total * self.experts[expert](x[batch, token])
        return out


def sparse_reference(family: str, top_k: int, num_experts: int = 3) -> LlavaForConditionalGeneration:
    model = tiny_vlm(family)
    if family == "phi":
        assert model.lm_head.bias is None  # as in MoE-LLaVA's Phi
    generator = torch.Generator().manual_seed(2)
    for index in LAYERS:
        layer = model.model.language_model.layers[index]
        experts = [copy.deepcopy(layer.mlp) for _ in range(num_experts)]
        for number, expert in enumerate(experts):
            shake(expert, scale=0.3, seed=10 * index + number)
        layer.mlp = LoopMoE(torch.randn(num_experts, 32, generator=generator), experts, top_k)
    return model


def moe_llava_weights(model: LlavaForConditionalGeneration, **options: Any) -> Weights:
    weights = original_weights(model, projector="model.mm_projector.image_spatial_proj.", **options)
    for index in LAYERS:
        layer = model.model.language_model.layers[index].mlp
        prefix = f"model.layers.{index}.mlp."
        weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        weights[f"{prefix}deepspeed_moe.gate.wg.weight"] = layer.gate_ED
        for number, expert in enumerate(layer.experts):
            for leaf, value in expert.named_parameters():
                weights[f"{prefix}deepspeed_moe.experts.deepspeed_experts.{number}.{leaf}"] = value.detach()
    return weights


def write_folder(
    folder: Path,
    family: str,
    model: LlavaForConditionalGeneration,
    *,
    top_k: int = 2,
    save: Callable[[Path, Weights], None] = save_safetensors,
    change: Callable[[Weights], None] = lambda weights: None,
    has_tower: bool = False,
    moe: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    tower = write_tower(folder / "clip", model)
    write_tokenizer(folder)
    prefix = "model.image_tower.image_tower.vision_model." if has_tower else ""
    weights = moe_llava_weights(model, tower=prefix)
    change(weights)
    save(folder, weights)
    text = text_fields(model)
    if family == "stablelm":
        text = {OLD_KEYS.get(key, key): value for key, value in text.items()}
    section = {
        "moe_enable": True, "moe_mode": "sparse", "moe_layers_idx": list(LAYERS), "num_experts": [3, 3],
        "top_k_experts": top_k, "ep_size": 1, "capacity_factor": 1.5, "eval_capacity_factor": 2.0, "min_capacity": 0,
        "use_residual": False, "router_aux_loss_coef": 0.02, "train_modules": ["fc1", "fc2", "wg"],
    }  # fmt: skip
    config = {
        **text,
        "model_type": f"moe_llava_{TYPES[family]}",
        "mm_image_tower": str(tower),
        "image_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "moe": {**section, **(moe or {})},
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


@pytest.mark.parametrize("family", sorted(TYPES))
@pytest.mark.parametrize("top_k", [1, 2])
def test_equals_a_plain_loop(family: str, top_k: int, tmp_path: Path) -> None:
    model = sparse_reference(family, top_k)
    is_phi = family == "phi"
    folder = write_folder(
        tmp_path / "theirs",
        family,
        model,
        top_k=top_k,
        save=save_bin_shards if is_phi else save_safetensors,
        has_tower=is_phi,
    )
    converted = from_moe_llava(folder, OPTIONS)
    assert set(NOTES[False]) <= set(converted.notes)
    write_converted(converted, tmp_path / "ours")
    loaded, _ = moe_lvlm.load(tmp_path / "ours")
    moe = loaded.config.moe_config
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.layers, moe.balance.coefficient) == (3, top_k, LAYERS, 0.02)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_the_order_of_the_experts_matters(tmp_path: Path) -> None:
    """Were experts or gate rows taken in another order, the test above would see it: it is not blind to it."""
    model = sparse_reference("llama", 2)
    expected = logits(model)
    first = model.model.language_model.layers[0].mlp
    first.experts = nn.ModuleList(reversed(list(first.experts)))
    assert (logits(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "moe_llava_minicpm"}, "model_type 'moe_llava_minicpm'; allowed: moe_llava_llama"),
        ({"image_projector_type": "qformer2_64"}, "image_projector_type: 'qformer2_64'; allowed: mlp2x_gelu"),
        ({"moe": {"use_residual": True}}, r"moe\.use_residual"),
        ({"moe": {"num_experts": [3, 4]}}, r"moe\.num_experts: \[3, 4\]; allowed: the same number"),
        ({"moe": {"num_experts": [2, 2]}}, r"expert tensors have no place: .*deepspeed_experts\.2"),
        ({"moe": {"num_experts": [4, 4]}}, r"deepspeed_experts\.3\.down_proj\.weight: not in the source"),
        ({"moe": {"moe_layers_idx": [0]}}, r"layers\.2"),
        ({"moe": {"moe_layers_idx": None}}, "moe_layers_idx, num_experts and top_k_experts are needed"),
        ({"moe": {"moe_enable": False}}, "no mixture of experts"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "llama", sparse_reference("llama", 2), **options)
    with pytest.raises(ValueError, match=message):
        from_moe_llava(folder, OPTIONS)


def test_qwen_1_is_refused(tmp_path: Path) -> None:
    def first_qwen(weights: Weights) -> None:
        weights["transformer.h.0.mlp.w1.weight"] = torch.ones(2)

    folder = write_folder(tmp_path, "qwen2", sparse_reference("qwen2", 2), change=first_qwen)
    with pytest.raises(ValueError, match="Qwen-1"):
        from_moe_llava(folder, OPTIONS)


def test_experts_of_different_widths(tmp_path: Path) -> None:
    def narrow(weights: Weights) -> None:
        name = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.1.up_proj.weight"
        weights[name] = weights[name][:40]

    folder = write_folder(tmp_path, "llama", sparse_reference("llama", 2), change=narrow)
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj\.weight: shape \(40, 32\), that of expert 0"):
        from_moe_llava(folder, OPTIONS)


def test_released_routing_keeps_capacity_and_noise(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "theirs", "llama", sparse_reference("llama", 2))
    converted = from_moe_llava(folder, OPTIONS, has_released_routing=True)
    moe = converted.config.moe_config
    assert moe is not None
    assert (moe.capacity_factor, moe.eval_capacity_factor, moe.router.second_choice_noise) == (1.5, 2.0, "gumbel")
    assert set(NOTES[True]) <= set(converted.notes)
    plain = from_moe_llava(folder, OPTIONS).config.moe_config
    assert plain is not None
    assert (plain.capacity_factor, plain.router.second_choice_noise) == (None, "none")
