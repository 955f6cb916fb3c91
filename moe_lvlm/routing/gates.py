"""Gates: the scores of tokens against experts, float32 whatever the type of weights and tokens.

A gate is a module of its own call, so that ZeRO-3 gathers its parameters.

T tokens   D model width   E experts   P width of the projection
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_lvlm.config.moe import CosineGateSettings, RouterSettings

# Tutel's bound on 1 / temperature, which GMoE keeps
_HIGHEST_SCALE = 100.0


class Gate(nn.Module):
    """[T, D] -> scores [T, E]. Draws itself anew by `reset_parameters`."""

    def reset_parameters(self) -> None:
        """Draw the weights from torch's generator."""
        raise NotImplementedError


class LinearGate(Gate):
    """W x (LTDR eq. 6). weight: [E, D].

    init: `normal` draws W from N(0, 0.02), `linear` as torch draws a linear layer.
    """

    def __init__(self, model_width: int, num_experts: int, *, init: str = "normal") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, model_width))
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "normal":
            nn.init.normal_(self.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_TD: Tensor) -> Tensor:
        return _Float32Linear.apply(x_TD, self.weight)


class CosineGate(Gate):
    """GMoE's cosine router (its code: Tutel's): cos(W_p x + b, e_i) / temperature for expert i.

    projection: [P, D]. bias: [P]. experts: [E, P], one embedding an expert. log_scale: [1], log of 1 / temperature,
    which is held below 100.
    """

    def __init__(self, model_width: int, num_experts: int, settings: CosineGateSettings) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(settings.projection, model_width))
        self.bias = nn.Parameter(torch.empty(settings.projection))
        self.experts = nn.Parameter(torch.empty(num_experts, settings.projection))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.temperature = settings.temperature
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.projection.shape[1])
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.normal_(self.experts, std=0.01)
        nn.init.constant_(self.log_scale, math.log(1 / self.temperature))

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            projected_TP = _Float32Linear.apply(x_TD, self.projection) + self.bias.float()
            token_TP = nn.functional.normalize(projected_TP, dim=-1)
            expert_EP = nn.functional.normalize(self.experts.float(), dim=-1)
            scale = self.log_scale.float().clamp(max=math.log(_HIGHEST_SCALE)).exp()
            return token_TP @ expert_EP.t() * scale


def build_gate(model_width: int, num_experts: int, settings: RouterSettings) -> Gate:
    """The gate that a router's settings name."""
    if isinstance(settings.gate, CosineGateSettings):
        return CosineGate(model_width, num_experts, settings.gate)
    return LinearGate(model_width, num_experts, init=settings.init)


class _Float32Linear(torch.autograd.Function):
    """x w^T in float32, keeping x in its own type for the backward pass rather than a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        if _has_kernels(x_TD, weight_ED):
            from moe_lvlm.routing.gate_kernels import score

            return score(x_TD, weight_ED)
        with torch.autocast(x_TD.device.type, enabled=False):
            return nn.functional.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        if needs_x and needs_weight and _has_kernels(x_TD, weight_ED):
            from moe_lvlm.routing.gate_kernels import score_backward

            return score_backward(grads[0], x_TD, weight_ED)
        grad_x_TD = (grads[0] @ weight_ED.float()).to(x_TD.dtype) if needs_x else None
        grad_weight_ED = (grads[0].t() @ x_TD.float()).to(weight_ED.dtype) if needs_weight else None
        return grad_x_TD, grad_weight_ED


def _has_kernels(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether kernels of ours compute these scores."""
    if not x_TD.is_cuda:
        return False
    from moe_lvlm.routing.gate_kernels import can_score  # Triton, which builds of torch without CUDA do not bring

    return can_score(x_TD, weight_ED)
