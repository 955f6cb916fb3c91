"""Adapted tiny language models, contexts for them, and the paper's equations as a plain loop in float64.

B batch   S sequence   N samples   E experts   G width of an embedding
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_lvlm.adapters import LoRAExpertLinear, adapted_linears, attach, look_up
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.routing import Modality, RoutingContext, RoutingTrace
from tests.tiny_models import BLIP_TEXT_CONFIGS, TEXT_CONFIGS, shake, tiny_causal_lm

WIDTH = 6
NUM_CLUSTERS = 5
FAMILIES = [*TEXT_CONFIGS, "opt"]
ATTENTION = {"phi3": ("qkv_proj", "o_proj"), "opt": ("q_proj", "v_proj", "out_proj"), "phi": ("q_proj", "dense")}
FFN = {"phi3": ("gate_up_proj", "down_proj"), "opt": ("fc1", "fc2"), "phi": ("fc1", "fc2")}


def targets_of(family: str) -> tuple[str, ...]:
    """Some linears of attention and of the FFN."""
    return (*ATTENTION.get(family, ("q_proj", "v_proj")), *FFN.get(family, ("up_proj", "down_proj")))


def mocle(**fields: Any) -> MoCLESettings:
    """Three experts of rank 2 and a universal one."""
    defaults = {"rank": 2, "alpha": 3.0, "num_experts": 3, "num_clusters": NUM_CLUSTERS, "embedding_width": WIDTH}
    return MoCLESettings(**(defaults | {"temperature": 0.7} | fields))


def dense_lm(family: str = "llama", **fields: Any) -> PreTrainedModel:
    """A dense language model in evaluation mode."""
    if family in TEXT_CONFIGS:
        return tiny_causal_lm(family, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(BLIP_TEXT_CONFIGS[family]())
    shake(model, scale=0.1, seed=0)
    return model.eval()


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module with `.layers`."""
    base = model.base_model
    return base if hasattr(base, "layers") else base.decoder


def shake_adapters(model: nn.Module, *, seed: int = 0) -> None:
    """Adapters that do something, experts that differ, gates that are sure of themselves."""
    generator = torch.Generator().manual_seed(seed)

    def add(parameter: Tensor, scale: float) -> None:
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)

    for _, linear in adapted_linears(model):
        add(linear.lora_A, 0.2)
        add(linear.lora_B, 0.2)
        if isinstance(linear, LoRAExpertLinear):
            for parameter in linear.gate.parameters():
                add(parameter, 1.0)
    for name, parameter in model.named_parameters():
        if name.endswith("table.weight"):
            add(parameter, 1.0)


def adapted_lm(settings: LoRASettings, family: str = "llama", *, seed: int = 0) -> PreTrainedModel:
    """A language model with adapters that do something, in evaluation mode."""
    model = dense_lm(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach(decoder_of(model), settings)
    shake_adapters(model, seed=seed)
    return model.eval()


def words(batch: int = 4, sequence: int = 7, *, seed: int = 0) -> Tensor:
    """Random token ids [B, S]."""
    return torch.randint(3, 60, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def rows_context(lengths: list[int], sequence: int, *, left: bool = False, num_instruction: int = 2) -> RoutingContext:
    """A context of one sample a row, padded to `sequence`; the first words are the instruction, sample n is of cluster
    n mod 5 and dataset n mod 2, and its draw is 100 + n."""
    batch = len(lengths)
    sample_BS = torch.full((batch, sequence), -1, dtype=torch.int32)
    instruction_BS = torch.zeros(batch, sequence, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = sequence - length if left else 0
        sample_BS[row, start : start + length] = row
        instruction_BS[row, start : start + num_instruction] = True
    is_token_BS = sample_BS >= 0
    return RoutingContext(
        modality_BS=torch.where(is_token_BS, int(Modality.LANGUAGE), int(Modality.PADDING)).to(torch.int8),
        image_BS=torch.full_like(sample_BS, -1),
        sample_BS=sample_BS,
        num_samples=batch,
        instruction_BS=instruction_BS,
        cluster_N=torch.arange(batch) % NUM_CLUSTERS,
        dataset_N=torch.arange(batch) % 2,
        draw_N=100 + torch.arange(batch),
    )


def run(model: PreTrainedModel, input_ids: Tensor, context: RoutingContext, **kwargs: Any) -> tuple[Any, RoutingTrace]:
    """The model's output under a context, as a host calls it, and the trace."""
    looked_up = look_up(decoder_of(model), context)
    trace = RoutingTrace(looked_up)
    attention_mask = kwargs.pop("attention_mask", (context.sample_BS >= 0).long())
    output = model(input_ids=input_ids, attention_mask=attention_mask, routing=looked_up, routing_trace=trace, **kwargs)
    return output, trace


def plain_gates(scores_E: Tensor, settings: MoCLESettings) -> Tensor:
    """G of eq. 1, one row, float64."""
    probs_E = (scores_E.double() / settings.temperature).exp()
    probs_E = probs_E / probs_E.sum()
    gates_E = torch.zeros_like(probs_E)
    for _ in range(settings.top_k):
        left_E = torch.where(gates_E > 0, -1.0, probs_E)
        best = int(left_E.argmax())
        gates_E[best] = probs_E[best]
    return gates_E


def plain_output(linear: LoRAExpertLinear, x_I: Tensor, gates_E: Tensor) -> Tensor:
    """The output for one token, eq. 2 and 3 in float64."""
    settings = linear.settings
    lora_A, lora_B, x_I = linear.lora_A.detach().double(), linear.lora_B.detach().double(), x_I.detach().double()
    scale = settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)
    out_O = linear.weight.detach().double() @ x_I
    if linear.bias is not None:
        out_O = out_O + linear.bias.detach().double()
    for expert, gate in enumerate(gates_E.tolist()):
        if gate > 0:
            power = 2 if settings.compat == "released" and settings.has_universal else 1
            out_O = out_O + gate**power * scale * (lora_B[expert] @ (lora_A[expert] @ x_I))
    if settings.has_universal:
        out_O = out_O + (1 - gates_E.max()) * scale * (lora_B[-1] @ (lora_A[-1] @ x_I))
    return out_O


def with_table(context: RoutingContext, embedding_NG: Tensor) -> RoutingContext:
    """The context with rows of a table."""
    return replace(context, embedding_NG=embedding_NG)
