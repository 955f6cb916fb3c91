"""LoRA experts as plain LoRAs: with the noise off, a cluster's gates are constants.

E experts (without the universal one)   r rank   I inputs, O outputs of a linear   J experts used   rows of a table
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lvlm.adapters.attach import adapted_linears
from moe_lvlm.adapters.gates import expert_weights
from moe_lvlm.adapters.linear import AdaptedLinear, LoRAExpertLinear
from moe_lvlm.adapters.stacked import StackedAdapter
from moe_lvlm.adapters.table import TABLE, adapted_decoders


class MergedLoRA(NamedTuple):
    """A plain LoRA, float32 (float64 if the experts are): A [J x r, I], B [O, J x r], and PEFT's `lora_alpha`."""

    A: Tensor
    B: Tensor
    alpha: float


@torch.no_grad()
def merged_lora(linear: AdaptedLinear, gates_E: Tensor | None = None) -> MergedLoRA:
    """The plain LoRA that computes what the linear's adapter does for a sample with these gates.

    gates_E: G of MoCLE eq. 1, [E], the `top_k` largest entries, 0 elsewhere; None for a single LoRA. Its rank is 2 r
    with a universal expert, A = [G A_top; (1 - G) A_u], else top_k x r; alpha grows with it so that the scale stays
    alpha / r (rsLoRA: alpha / sqrt r). Compat `released`: G squared for the expert.

    Raises:
        ValueError: gates for a single LoRA, none for experts, another number of them, or more than `top_k` above 0; an
            adapter on the stacked experts of a mixture.
    """
    settings = linear.settings
    _check_plain(linear, linear.site.part)
    if not isinstance(linear, LoRAExpertLinear):
        if gates_E is not None:
            raise ValueError("gates: a single LoRA has none; allowed: None")
        return MergedLoRA(_wide(linear.lora_A[0]), _wide(linear.lora_B[0]), settings.alpha)
    E, top_k = linear.settings.num_experts, linear.settings.top_k
    if gates_E is None or gates_E.shape != (E,):
        shape = None if gates_E is None else tuple(gates_E.shape)
        raise ValueError(f"gates: {shape}; allowed: shape ({E},)")
    if int((gates_E != 0).sum()) > top_k:
        raise ValueError(f"gates: {gates_E.tolist()} holds more than top_k ({top_k}) numbers that are not 0")
    gate_K, expert_K = _wide(gates_E).sort(descending=True, stable=True)
    gate_K, expert_J = gate_K[:top_k], expert_K[:top_k]
    weight_J = expert_weights(gate_K, linear.settings)
    if linear.settings.has_universal:
        weight_J = torch.cat((weight_J, 1 - gate_K))
        expert_J = torch.cat((expert_J, expert_J.new_tensor([E])))
    lora_A = _wide(linear.lora_A[expert_J])
    lora_B = _wide(linear.lora_B[expert_J])
    num_used = len(expert_J)
    return MergedLoRA(
        (weight_J.to(lora_A.dtype)[:, None, None] * lora_A).flatten(0, 1),
        lora_B.transpose(0, 1).flatten(1),
        settings.alpha * (num_used**0.5 if settings.rslora else num_used),
    )


@torch.no_grad()
def gate_table(model: nn.Module) -> dict[str, Tensor]:
    """G of MoCLE eq. 1 with the noise off, for every adapted linear by its name: float32 [rows, E], 0 for experts that
    are not chosen. A row is a cluster, or a dataset.

    Raises:
        ValueError: no LoRA experts, gates that read hidden states, which differ from sample to sample, or adapters on the
            stacked experts of a mixture.
    """
    tables: dict[str, Tensor] = {}
    for decoder_name, decoder in adapted_decoders(model):
        for name, linear in adapted_linears(decoder):
            whole = f"{decoder_name}.{name}" if decoder_name else name
            _check_plain(linear, whole)
            if not isinstance(linear, LoRAExpertLinear):
                raise ValueError(f"{whole}: a single LoRA has no gates")
            if not linear.settings.reads_table:
                raise ValueError(
                    f"{whole}: gating {linear.settings.gating} decides by hidden states, so there is no table of gates; "
                    "allowed: cluster, dataset"
                )
            table = decoder._modules.get(TABLE) if linear.table is None else linear.table
            assert isinstance(table, nn.Embedding)
            every_N1 = torch.ones(table.num_embeddings, 1, dtype=torch.bool, device=table.weight.device)
            decision = linear.scores(table.weight, keep_N1=every_N1)
            gates_NE = torch.zeros_like(decision.probs_RE)
            tables[whole] = gates_NE.scatter(1, decision.expert_ids_RK, decision.weights_RK)
    if not tables:
        raise ValueError(f"{type(model).__name__} holds no LoRA experts")
    return tables


def _check_plain(adapter: AdaptedLinear, name: str) -> None:
    """ValueError for an adapter on stacked experts, which is no LoRA on one linear layer."""
    if isinstance(adapter, StackedAdapter):
        raise ValueError(
            f"{name}: an adapter on the stacked experts of a mixture, for which PEFT has no form; allowed: linear layers"
        )


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
