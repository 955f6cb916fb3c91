"""The gate of LoRA experts (MoCLE eq. 1): what it reads, its scores, its noise, its choice.

E experts (without the universal one)   K experts chosen   G width of what a gate reads   N rows decided for
"""

from __future__ import annotations

import math
import zlib
from typing import Literal

import torch
from torch import Tensor, nn

from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.routing.gates import Gate, LinearGate
from moe_lvlm.routing.noise import sample_noise
from moe_lvlm.routing.types import RoutingDecision, Site


class ReleasedGate(Gate):
    """The gate of the authors' code: with a bias, in the type of its weights. weight: [E, G]. bias: [E]."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch draws a linear layer."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x_NG: Tensor) -> Tensor:
        with torch.autocast(x_NG.device.type, enabled=False):
            return nn.functional.linear(x_NG.to(self.weight.dtype), self.weight, self.bias)


def build_gate(width: int, settings: MoCLESettings) -> Gate:
    """The gate that the settings name."""
    if settings.compat == "released":
        return ReleasedGate(width, settings.num_experts)
    return LinearGate(width, settings.num_experts)


def draw_noise(draw_N: Tensor, site: Site, settings: MoCLESettings) -> Tensor:
    """Float32 [N, E]: the noise of a linear's gate, which depends on the draw and on the linear."""
    # A number from the name: it stays when other linears are adapted too, and is none of the small numbers by which
    # connectors draw theirs.
    stream = zlib.crc32(f"{site.part} {site.layer}".encode())
    return sample_noise(draw_N, layer=stream, num_experts=settings.num_experts, std=settings.noise_std)


def choose_experts(
    scores_NE: Tensor, keep_N1: Tensor, settings: MoCLESettings, *, noise_NE: Tensor | None, is_token: bool
) -> RoutingDecision:
    """top_k(softmax((scores + noise) / temperature)), the largest entries unchanged (MoCLE eq. 1).

    Equal scores go to the lowest index. Float32, but for compat `released`, where the softmax is in the scores' type.
    weights_RK of the decision are the gates G; what the released code multiplies by is G squared.
    """
    if noise_NE is not None:
        scores_NE = scores_NE + noise_NE.to(scores_NE.dtype)
    logits_NE = scores_NE / settings.temperature
    probs_NE = logits_NE.softmax(dim=-1).float()
    # By the scores: several probabilities may have underflowed to the same 0.
    order_NE = logits_NE.detach().sort(dim=-1, descending=True, stable=True).indices
    expert_ids_NK = order_NE[:, : settings.top_k]
    keep_NK = keep_N1.expand(-1, settings.top_k)
    weights_NK = probs_NE.gather(1, expert_ids_NK) * keep_NK
    level: Literal["token", "sample"] = "token" if is_token else "sample"
    return RoutingDecision(logits_NE.float(), probs_NE, expert_ids_NK, weights_NK, keep_NK, level)


def expert_weights(gates_NK: Tensor, settings: MoCLESettings) -> Tensor:
    """What the chosen experts' outputs are multiplied by: G, or G squared (compat `released`, beside a universal one)."""
    return gates_NK.square() if settings.compat == "released" and settings.has_universal else gates_NK
