"""A checkpoint of MoCLE's authors becomes a model of ours: their Q-Former and LoRA experts in an InstructBLIP.

The layout is LAVIS': `{"model": weights, "config": ..., "optimizer": ...}`, with what was trained (and perhaps the rest).
Each wrapped linear has `lora_A.<i>`, `lora_B.<i>` for expert i and `g` for the universal one, `task_emb`, a table of its
own, and `w_gate` with a bias: what `compat: released` computes. Frozen parts are the InstructBLIP's.

E experts (without the universal one)   E' with it   r rank   I inputs, O outputs of a linear
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lvlm.checkpoint.source import LazyTensor
from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.conversion.bin_shards import load_restricted
from moe_lvlm.conversion.folder import Converted
from moe_lvlm.conversion.kmeans_file import read_centres
from moe_lvlm.conversion.target import build_target
from moe_lvlm.data.clusters import PROBE, ClusterTable
from moe_lvlm.data.encoder import DEFAULT_ENCODER, ENCODER_VARIABLE, Encode, load_encoder
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.build import config_of, open_weights
from moe_lvlm.models.config import with_fields
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig
from moe_lvlm.models.load import find_model, read_processor

# Constants of the authors' code (LoraConfig in mocle.py), which no file holds
ALPHA, DROPOUT = 32.0, 0.1
_UNIVERSAL = "g"
_LINEAR = re.compile(
    r"llm_model\.base_model\.model\.(?P<linear>.+)\."
    r"(?P<leaf>lora_[AB]\.(?P<expert>\w+)\.weight|task_emb\.weight|w_gate\.weight|w_gate\.bias)"
)
_OURS = {"task_emb.weight": "table.weight", "w_gate.weight": "gate.weight", "w_gate.bias": "gate.bias"}
# What was trained besides -> names of InstructBLIP
_CONNECTOR = ("query_tokens", "Qformer.bert.", "llm_proj.")
_RENAMED = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.embeddings.layernorm."),
    ("Qformer.bert.", "qformer."),
    ("llm_proj.", "language_projection."),
    ("ln_vision.", "vision_model.post_layernorm."),
    ("query_tokens", "query_tokens"),
)
# Frozen: the base brings them
_FROZEN = ("llm_model.", "visual_encoder.", "sbert.")
_BUFFERS = (".position_ids", ".inv_freq")


@dataclass(frozen=True, slots=True)
class _Sorted:
    """adapters: by linear (in our names), by leaf. trained: other weights in our names. num_frozen: left out."""

    adapters: dict[str, dict[str, Tensor]]
    trained: dict[str, Tensor]
    num_frozen: int


def from_released(path: str | Path, base: str | Path, *, temperature: float | None = None) -> Converted:
    """The authors' checkpoint in an InstructBLIP with the same language model (Vicuna-7B v1.1).

    path: a file of torch, read without running anything in it. base: an InstructBLIP folder. temperature: of the softmax
    (their `gates_tmp`); None is what the file's configuration says.

    Raises:
        ValueError: another layout, an unknown weight, a base that does not fit, no temperature.
    """
    file = resolve(path)
    loaded = load_restricted(file)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: holds no weights; allowed: a checkpoint of LAVIS, with the weights under 'model'")
    found = _sort(state, file)
    settings = _read_settings(found, _model_config(loaded), temperature, file)
    folder, processor_folder = find_model(base)
    plain = config_of(folder)
    if not isinstance(plain, MoEInstructBlipConfig) or plain.is_answer_apart:
        raise ValueError(f"{folder}: {plain.model_type}; allowed: an InstructBLIP around a decoder-only language model")
    if plain.adapter is not None or plain.experts is not None:
        raise ValueError(
            f"{folder}: it holds adapters or a Q-MoE already; allowed: the InstructBLIP as it was published"
        )
    config = with_fields(plain, adapter=settings.model_dump(mode="json"))
    weights = open_weights(folder)
    tensors = {name: LazyTensor.from_source(weights, name) for name in weights.names()}
    unknown = sorted(found.trained.keys() - tensors.keys())
    if unknown:
        raise ValueError(f"{folder}: has no {', '.join(unknown[:5])}, which {file} holds")
    tensors |= {name: LazyTensor.of(tensor) for name, tensor in found.trained.items()}
    for linear, leaves in found.adapters.items():
        tensors |= {f"{linear}.{leaf}": LazyTensor.of(one) for leaf, one in _stacked(leaves, settings).items()}
    target = build_target(config)
    tensors = {name: one for name, one in tensors.items() if name not in target.tied}
    return Converted(
        config=config,
        weights=target.complete(tensors),
        processor=read_processor(processor_folder),
        before=plain.to_dict(),
        notes=tuple(_notes(found, settings)),
    )


def _sort(state: Mapping[str, Tensor], file: Path) -> _Sorted:
    adapters: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    num_frozen = 0
    for name, tensor in state.items():
        if (match := _LINEAR.fullmatch(name)) is not None:
            adapters.setdefault(f"language_model.{match['linear']}", {})[match["leaf"]] = tensor
        elif name.startswith(_FROZEN) or name.endswith(_BUFFERS):
            num_frozen += 1
        elif (renamed := _rename(name)) is not None:
            trained[renamed] = tensor
        else:
            raise ValueError(f"{file}: {name}: not a weight of MoCLE on InstructBLIP, as LAVIS names them")
    for prefix in _CONNECTOR:
        if not any(name.startswith(prefix) for name in state):
            raise ValueError(f"{file}: has no {prefix}*, which MoCLE trains; allowed: a whole checkpoint")
    return _Sorted(adapters, trained, num_frozen)


def _rename(name: str) -> str | None:
    for old, new in _RENAMED:
        if name.startswith(old):
            return (new + name.removeprefix(old)).replace("attention.self.", "attention.attention.")
    return None


def _model_config(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `model` section of the configuration that LAVIS saves, empty if there is none."""
    config = loaded.get("config")
    section = config.get("model") if isinstance(config, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _read_settings(found: _Sorted, said: Mapping[str, Any], temperature: float | None, file: Path) -> MoCLESettings:
    """From shapes; from the file's configuration what no shape tells; alpha and dropout from their code.

    Raises:
        ValueError: no experts, linears that differ in theirs, or no temperature.
    """
    if not found.adapters:
        raise ValueError(f"{file}: has no llm_model.*.lora_A; allowed: a checkpoint of MoCLE")
    names = {linear: frozenset(leaves) for linear, leaves in found.adapters.items()}
    first, leaves = next(iter(found.adapters.items()))
    for linear, held in names.items():
        if held != names[first]:
            raise ValueError(
                f"{file}: {linear} holds {sorted(held ^ names[first])[:3]} and {first} does not, or vice versa"
            )
    missing = sorted(_OURS.keys() - names[first])
    if missing:
        raise ValueError(f"{file}: {first} has no {', '.join(missing)}; allowed: gates by cluster (cluster: True)")
    num_experts, width = leaves["w_gate.weight"].shape
    experts = [str(expert) for expert in range(num_experts)]
    has_universal = f"lora_A.{_UNIVERSAL}.weight" in leaves
    wanted = {f"lora_{kind}.{expert}.weight" for kind in "AB" for expert in [*experts, *([_UNIVERSAL] * has_universal)]}
    if odd := sorted((names[first] - _OURS.keys()) ^ wanted):
        raise ValueError(
            f"{file}: {first}: w_gate is for {num_experts} experts, which does not fit {', '.join(odd[:4])}"
        )
    tau = temperature if temperature is not None else said.get("gates_tmp")
    if tau is None:
        raise ValueError(f"{file}: does not say the temperature of the gates (gates_tmp); allowed: --temperature")
    return MoCLESettings(
        target_modules=tuple(dict.fromkeys(linear.rpartition(".")[2] for linear in found.adapters)),
        rank=leaves["lora_A.0.weight"].shape[0],
        alpha=ALPHA,
        dropout=DROPOUT,
        num_experts=num_experts,
        has_universal=has_universal,
        temperature=float(tau),
        noise=said.get("noise_std"),
        num_clusters=leaves["task_emb.weight"].shape[0],
        embedding_width=width,
        compat="released",
    )


def _stacked(leaves: Mapping[str, Tensor], settings: MoCLESettings) -> dict[str, Tensor]:
    """One linear's parameters: lora_A [E', r, I], lora_B [E', O, r], the universal expert last, gate and table."""
    experts = [str(expert) for expert in range(settings.num_experts)] + [_UNIVERSAL] * settings.has_universal
    stacked = {
        f"lora_{kind}": torch.stack([leaves[f"lora_{kind}.{expert}.weight"] for expert in experts]) for kind in "AB"
    }
    return stacked | {ours: leaves[theirs] for theirs, ours in _OURS.items()}


def _notes(found: _Sorted, settings: MoCLESettings) -> list[str]:
    notes = [
        f"alpha {ALPHA:g} and dropout {DROPOUT:g} are those of the authors' code; no file holds them",
        "their code takes the gates' softmax in float16 whatever the weights are; here it is in the type of the weights "
        "(moe_lvlm.load: float32), so gates differ by up to 5e-4",
    ]
    if found.num_frozen:
        notes.append(f"{found.num_frozen} frozen tensors of the file were left out: the InstructBLIP brings them")
    return notes


def write_clusters(kmeans: Path, target: Path, converted: Converted, *, encode: Encode | None = None) -> None:
    """The authors' k-means as a table of clusters that knows no instruction yet: all go to the nearest centre.

    encode: the encoder that it was fitted on, by which the table tells others; None loads all-MiniLM-L6-v2, or what
    MOE_LVLM_ENCODER names.

    Raises:
        ValueError: a file that is no k-means, or one of other clusters than the gates are for.
    """
    centres_KW = read_centres(kmeans)
    settings = converted.config.adapter_settings if isinstance(converted.config, MoEInstructBlipConfig) else None
    assert isinstance(settings, MoCLESettings), "from_released gives one"
    expected = (settings.num_clusters, settings.embedding_width)
    if centres_KW.shape != expected:
        raise ValueError(f"{kmeans}: centres of shape {centres_KW.shape}; the gates are for {expected}")
    load = encode or load_encoder(os.environ.get(ENCODER_VARIABLE) or DEFAULT_ENCODER, device="cpu")
    (probe_W,) = load([PROBE])
    ClusterTable(
        centres_KW=centres_KW,
        hashes_I=np.empty(0, np.uint64),
        ids_I=np.empty(0, np.int32),
        probe_W=probe_W,
        encoder=DEFAULT_ENCODER,
        seed=0,
    ).save(target)
