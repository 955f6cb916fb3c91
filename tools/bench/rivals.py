"""transformers' and DeepSpeed's mixture-of-experts layers, with the problem's weights.

Imports stand in the builders: a library that is not there makes its variants unavailable, not the benchmark.

B batch   S sequence   D model width   E experts   C capacity of an expert
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from bench.layers import BenchLayer, SwiGLU
from bench.problem import Problem


class UnavailableError(RuntimeError):
    """This variant cannot run on this machine, and why."""


class _Block(BenchLayer):
    """A library's own block; its gate's weight lies at `gate`."""

    def __init__(self, block: nn.Module, gate: str) -> None:
        super().__init__()
        self.block = block
        self._gate = gate

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.block(x_BSD)

    @property
    def gate_weight(self) -> Tensor:
        return self.block.get_parameter(self._gate)


# ------------------------------------------------------------------------------------------------------ transformers


def _mixtral_block(problem: Problem, implementation: str) -> nn.Module:
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        raise UnavailableError(f"transformers with MixtralSparseMoeBlock is not installed: {error}") from error
    sizes = problem.sizes
    config = MixtralConfig(
        hidden_size=sizes.model_width,
        intermediate_size=sizes.ffn_width,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    config._experts_implementation = implementation
    with torch.device(problem.x_BSD.device):
        block = MixtralSparseMoeBlock(config).to(problem.x_BSD.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(problem.gate_ED)
        block.experts.gate_up_proj.copy_(torch.cat((problem.w1_EFD, problem.w3_EFD), dim=1))
        block.experts.down_proj.copy_(problem.w2_EDF)
    return block


def transformers_eager(problem: Problem) -> BenchLayer:
    """Transformers' Mixtral block, its loop over experts."""
    return _Block(_mixtral_block(problem, "eager"), "gate.weight")


def transformers_grouped_mm(problem: Problem) -> BenchLayer:
    """Transformers' Mixtral block on torch.nn.functional.grouped_mm."""
    return _Block(_mixtral_block(problem, "grouped_mm"), "gate.weight")


# --------------------------------------------------------------------------------------------------------- DeepSpeed


def _import_deepspeed() -> None:
    try:
        import deepspeed.utils
    except ImportError as error:
        raise UnavailableError(f"deepspeed is not installed: {error}") from error
    deepspeed.utils.logger.setLevel(logging.ERROR)


def _autoep_layer(problem: Problem, *, use_grouped_mm: bool) -> BenchLayer:
    """DeepSpeed's AutoEP layer made from a Mixtral block, as its engine does it, on one rank without a group."""
    _import_deepspeed()
    try:
        from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    except ImportError as error:
        raise UnavailableError(f"this deepspeed has no AutoEP: {error}") from error
    sizes = problem.sizes
    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=sizes.experts,
        top_k=sizes.top_k,
        hidden_size=sizes.model_width,
        ffn_hidden_size=sizes.ffn_width,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    layer = AutoEPMoELayer(
        spec, _mixtral_block(problem, "eager"), ep_size=1, ep_rank=0, config=AutoEPConfig(use_grouped_mm=use_grouped_mm)
    )
    return _Block(layer, "router.gate.weight")


def deepspeed_dropless(problem: Problem) -> BenchLayer:
    """DeepSpeed's dropless AutoEP layer, its loop over experts."""
    return _autoep_layer(problem, use_grouped_mm=False)


def deepspeed_dropless_grouped(problem: Problem) -> BenchLayer:
    """DeepSpeed's dropless AutoEP layer on its grouped kernels (Triton's SwiGLU among them)."""
    if problem.x_BSD.device.type != "cuda":
        raise UnavailableError(
            "DeepSpeed's grouped experts end in a Triton activation, which needs a GPU; "
            "on a CPU only their loop runs (deepspeed_dropless)"
        )
    return _autoep_layer(problem, use_grouped_mm=True)


def _deepspeed_moe(problem: Problem) -> nn.Module:
    """deepspeed.moe.layer.MoE on one rank, with the problem's weights. It needs no process group at ep_size 1."""
    _import_deepspeed()
    from deepspeed.moe.layer import MoE

    sizes = problem.sizes
    moe = MoE(
        sizes.model_width,
        SwiGLU(problem.w1_EFD[0], problem.w2_EDF[0], problem.w3_EFD[0]),
        num_experts=sizes.experts,
        k=sizes.top_k,
        capacity_factor=sizes.capacity_factor,
        min_capacity=0,
        use_rts=False,
        # The second expert by probability, not by Gumbel noise: the function that all others compute.
        top2_2nd_expert_sampling=False,
    )
    moe.to(device=problem.x_BSD.device, dtype=problem.x_BSD.dtype)
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(problem.gate_ED)
        for index, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_proj.weight.copy_(problem.w1_EFD[index])
            expert.up_proj.weight.copy_(problem.w3_EFD[index])
            expert.down_proj.weight.copy_(problem.w2_EDF[index])
    return moe


class DeepSpeedCapacity(BenchLayer):
    """DeepSpeed's MoE layer as 0.19.8 has it: experts padded to a capacity, rows moved by gathers."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.moe: Any = _deepspeed_moe(problem)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.moe(x_BSD)[0]

    @property
    def gate_weight(self) -> Tensor:
        return self.moe.deepspeed_moe.gate.wg.weight

    @torch.no_grad()
    def count_dropped(self, x_BSD: Tensor) -> int:
        # (auxiliary loss, capacity, experts, indices, locations, gates, counts); an evicted route has index -1
        indices_KT = self.moe.deepspeed_moe.gate(x_BSD.flatten(0, 1), None, True)[3]
        return int((indices_KT < 0).sum())


class DeepSpeedEinsum(DeepSpeedCapacity):
    """The same layer as DeepSpeed had it up to 0.18, and MoE-LLaVA runs it: rows moved by products with [T, E, C]."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        layer = self.moe.deepspeed_moe
        x_TD = x_BSD.flatten(0, 1)
        _, combine_TEC, dispatch_TEC, _ = layer.gate(x_TD, None)
        rows_ECD = torch.einsum("sec,sm->ecm", dispatch_TEC.type_as(x_TD), x_TD)
        out_ECD = layer.experts(rows_ECD[None])[0]
        return torch.einsum("sec,ecm->sm", combine_TEC.type_as(x_TD), out_ECD).view_as(x_BSD)
