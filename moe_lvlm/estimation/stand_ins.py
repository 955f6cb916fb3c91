"""A model's twin that runs on fake tensors: the same modules, but what depends on data goes by expectations.

T tokens   D model width   F FFN width   E experts   K slots a token   R routed rows   A rows that arrive here
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lvlm.adapters.linear import LoRAExpertLinear
from moe_lvlm.adapters.low_rank import add_lora, add_sample_experts
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing.cluster import ClusterRouter
from moe_lvlm.routing.instruct import InstructRouter
from moe_lvlm.routing.ltdr import LongTailRouter
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.stgc import ConflictRouter
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext


def routed_rows(router: Router, *, tokens: int, tail_share: float) -> int:
    """Kept slots of so many tokens: top_k each, and the tail's more where the router has a tail. Under `dynamic`, where
    a token may take any number, top_k too."""
    rows = tokens * router.top_k
    if isinstance(router, LongTailRouter):
        rows += round(tokens * tail_share * (router.num_slots - router.top_k))
    return rows


def twin(module: nn.Module, give: Callable[[Tensor], Tensor], replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy with other parameters and buffers and without hooks, in training and without checkpointing.

    give: the tensor that stands in the place of a parameter or buffer. replace: gives what stands in the place of a copied
    module, or the copy itself.
    """
    made = copy.copy(module)
    state = made.__dict__
    state |= {name: OrderedDict() for name, value in state.items() if "_hooks" in name and isinstance(value, dict)}
    for name in ("_parameters", "_buffers"):
        state[name] = {leaf: None if tensor is None else give(tensor) for leaf, tensor in state[name].items()}
    made._modules = {
        name: None if child is None else twin(child, give, replace) for name, child in module._modules.items()
    }
    made.training = True
    if hasattr(made, "gradient_checkpointing"):
        made.__dict__["gradient_checkpointing"] = False
    return replace(made)


class StandInMoELayer(nn.Module):
    """In the place of a MoELayer: its own router and shared experts, and experts that get as many rows as expected.

    tokens: that are no padding. expert_parallel_size: processes that the experts are spread over; as many rows arrive as
    leave, and they are kept for the backward pass where on one process they are gathered again.
    """

    def __init__(self, layer: MoELayer, *, tokens: int, tail_share: float, expert_parallel_size: int) -> None:
        super().__init__()
        if layer.adapters is not None:
            raise ValueError(
                "adapters on the experts of a MoE layer: their cost is not estimated; allowed: adapters on linear layers"
            )
        self.router = layer.router
        self.experts = StandInExperts(
            layer.experts,
            num_rows=routed_rows(layer.router, tokens=tokens, tail_share=tail_share),
            # STGC's experts look at the rows themselves
            keeps_rows=expert_parallel_size > 1 or isinstance(layer.router, ConflictRouter),
        )
        self.shared_experts = layer.shared_experts
        self.site = layer.site

    def forward(self, x_BSD: Tensor, context: RoutingContext, trace: RoutingTrace | None = None) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        decision = self.router(x_TD, context)
        if trace is not None:
            trace.record(self.site, decision)
        by_token = decision.by_token(context)
        out_TD = self.experts(x_TD, by_token.weights_RK)
        if self.shared_experts is not None:
            for expert in self.shared_experts:
                out_TD = out_TD + expert(x_TD)
        return out_TD.view_as(x_BSD)


class BlindClusterRouter(ClusterRouter):
    """A router that does not look at the values of clusters."""

    def __init__(self, router: ClusterRouter) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(router.__dict__)

    def describe_samples(self, x_TD: Tensor, context: RoutingContext, num_samples: int) -> Tensor:
        assert context.cluster_N is not None
        described_NG: Tensor = self.embedding(context.cluster_N)
        return described_NG


class BlindInstructRouter(InstructRouter):
    """A router that does not look whether there are instructions."""

    def __init__(self, router: InstructRouter) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(router.__dict__)

    def describe_samples(self, x_TD: Tensor, context: RoutingContext, num_samples: int) -> Tensor:
        sample_T = context.sample_T.long()
        sum_ND = x_TD.new_zeros(num_samples, x_TD.shape[1]).float()
        sum_ND = sum_ND.index_add(0, sample_T, x_TD.float() * (sample_T >= 0)[:, None])
        return sum_ND / sum_ND.new_ones(num_samples, 1)


class StandInExperts(nn.Module):
    """In the place of experts: all rows pass the first one. From tokens to tokens, gathering and adding up included."""

    def __init__(self, experts: Experts, *, num_rows: int, keeps_rows: bool) -> None:
        super().__init__()
        self._parameters = experts._parameters
        self.num_rows = num_rows
        self.keeps_rows = keeps_rows

    def forward(self, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        stacks = [self._parameters.get(name) for name in ("w1", "w2", "w3")]
        return _Experts.apply(x_TD, weights_TK, self.num_rows, self.keeps_rows, *stacks)


class _Experts(torch.autograd.Function):
    """Keeps what the layer keeps: the tokens once, or the rows that arrived; the products before the activation; who goes
    where; the weights."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, num_rows: int, keeps_rows: bool, *stacks: Tensor | None
    ) -> Tensor:
        w1, w2, w3 = stacks
        assert w1 is not None and w2 is not None
        slot_R = torch.empty(num_rows, dtype=torch.int32, device=x_TD.device)
        row_TK = torch.empty(weights_TK.shape, dtype=torch.int32, device=x_TD.device)
        weights_R = weights_TK.new_empty(num_rows)
        rows_RD = x_TD.index_select(0, slot_R)
        gate_RF = rows_RD @ w1[0].t()
        up_RF = None if w3 is None else rows_RD @ w3[0].t()
        hidden_RF = gate_RF * (gate_RF if up_RF is None else up_RF)
        out_RD = hidden_RF @ w2[0].t()
        kept = rows_RD if keeps_rows else x_TD
        ctx.save_for_backward(kept, gate_RF, up_RF, slot_R, row_TK, weights_R, weights_TK, *stacks)
        return _sum_rows(out_RD, slot_R, x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, gate_RF, up_RF, slot_R, _, _, weights_TK, w1, w2, w3 = ctx.saved_tensors
        needs, keeps_rows = ctx.needs_input_grad, kept.shape[0] == len(slot_R)
        grad_RD = grads[0].index_select(0, slot_R)
        x_RD = kept if keeps_rows else kept.index_select(0, slot_R)
        hidden_RF = gate_RF * (gate_RF if up_RF is None else up_RF)
        grad_gate_RF = grad_RD @ w2[0]
        grad_up_RF = None if up_RF is None else grad_gate_RF * up_RF
        pairs = ((w1, grad_gate_RF, x_RD), (w2, grad_RD, hidden_RF), (w3, grad_up_RF, x_RD))
        given = [
            _stack_gradient(*pair) if is_needed and pair[0] is not None else None
            for pair, is_needed in zip(pairs, needs[4:], strict=True)
        ]
        grad_x_TD = None
        if needs[0]:
            grad_x_RD = grad_gate_RF @ w1[0]
            if w3 is not None and grad_up_RF is not None:
                grad_x_RD.addmm_(grad_up_RF, w3[0])
            grad_x_TD = _sum_rows(grad_x_RD, slot_R, grads[0])
        grad_weights_TK = torch.empty_like(weights_TK) if needs[1] else None
        return grad_x_TD, grad_weights_TK, None, None, *given


def _sum_rows(y_RD: Tensor, slot_R: Tensor, like_TD: Tensor) -> Tensor:
    """Sums by token, made in float32."""
    sum_TD = torch.zeros_like(like_TD, dtype=torch.promote_types(y_RD.dtype, torch.float32))
    return sum_TD.index_add(0, slot_R, y_RD.to(sum_TD.dtype)).to(y_RD.dtype)


def _stack_gradient(stack: Tensor, grad_RA: Tensor, x_RB: Tensor) -> Tensor:
    grad_stack = torch.empty_like(stack)
    torch.mm(grad_RA.t(), x_RB, out=grad_stack[0])
    return grad_stack


class StandInLoRAExperts(nn.Module):
    """In the place of a linear layer with LoRA experts behind a gate: every sample's (or token's) experts are some, and
    what the gate itself costs, which is little, is left out.

    by_token: as with gates that decide by token, and in packed rows; else a row of the batch is a sample.
    """

    def __init__(self, linear: LoRAExpertLinear, *, by_token: bool) -> None:
        super().__init__()
        self._parameters = linear._parameters
        self.settings = linear.settings
        self.by_token = by_token or linear.settings.gating == "token"

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, lora_a, lora_b = (self._parameters[name] for name in ("weight", "bias", "lora_A", "lora_B"))
        assert weight is not None and lora_a is not None and lora_b is not None
        x_TI = x.reshape(-1, x.shape[-1])
        base_TO = nn.functional.linear(x_TI, weight, bias)
        dropped_TI = nn.functional.dropout(x_TI, self.settings.dropout, self.training).to(lora_a.dtype)
        if self.by_token:
            out_TO = self._by_token(base_TO, dropped_TI, lora_a, lora_b)
        else:
            num_chosen = self.settings.top_k + self.settings.has_universal
            ids_BJ = torch.empty(x.shape[0], num_chosen, dtype=torch.int64, device=x.device)
            weights_BJ = torch.empty(ids_BJ.shape, device=x.device, requires_grad=lora_a.requires_grad)
            out_TO = add_sample_experts(
                base_TO,
                dropped_TI.view(*x.shape[:2], -1),
                lora_a,
                lora_b,
                expert_ids_BJ=ids_BJ,
                weights_BJ=weights_BJ,
            )
        return out_TO.view(*x.shape[:-1], -1)

    def _by_token(self, base_TO: Tensor, x_TI: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        num_tokens = x_TI.shape[0]
        num_rows = num_tokens * self.settings.top_k
        token_R = torch.empty(num_rows, dtype=torch.int64, device=x_TI.device)
        weights_R1 = torch.empty(num_rows, 1, dtype=x_TI.dtype, device=x_TI.device, requires_grad=lora_a.requires_grad)
        hidden_Rr = nn.functional.linear(x_TI.index_select(0, token_R), lora_a[0])
        out_RO = nn.functional.linear(hidden_Rr * weights_R1, lora_b[0])
        out_TO = base_TO + torch.zeros_like(base_TO).index_add(0, token_R, out_RO)
        if self.settings.has_universal:
            out_TO = add_lora(out_TO, x_TI, lora_a[-1], lora_b[-1], scale=weights_R1[:num_tokens])
        return out_TO
