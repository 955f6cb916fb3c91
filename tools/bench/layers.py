"""The floor and our own layers, as the benchmark runs them.

B batch   S sequence   D model width   F FFN width   E experts   R routed rows   K slots
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import silu

from bench.problem import Problem
from moe_lvlm.config.moe import (
    ConflictRouterSettings,
    DynamicRouterSettings,
    LongTailRouterSettings,
    MoEConfig,
    TopKRouterSettings,
)
from moe_lvlm.moe.dispatch import AllToAllDispatcher, Dispatcher
from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.routing import Router, RoutingContext, RoutingDecision, Site, build_router
from moe_lvlm.routing.ltdr import LongTailRouter


class BenchLayer(nn.Module, ABC):
    """One variant: [B, S, D] -> [B, S, D]."""

    @abstractmethod
    def forward(self, x_BSD: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def gate_weight(self) -> Tensor | None:
        """The router's weight [E, D], whose gradient is checked; None where there is no router."""

    def count_dropped(self, x_BSD: Tensor) -> int:
        """(token, expert) assignments that the variant leaves out for this input."""
        return 0


class SwiGLU(nn.Module):
    """A dense gated FFN with the given weights, w1 and w3 [F, D] and w2 [D, F]."""

    def __init__(self, w1: Tensor, w2: Tensor, w3: Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (w1, w3, w2))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return layer


class DenseFloor(BenchLayer):
    """A dense FFN of width K * F: the matrix products that top-k experts need, and nothing else."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        top_k = problem.sizes.top_k
        self.ffn = SwiGLU(
            problem.w1_EFD[:top_k].flatten(0, 1),
            problem.w2_EDF[:top_k].transpose(0, 1).flatten(1),
            problem.w3_EFD[:top_k].flatten(0, 1),
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.ffn(x_BSD)

    @property
    def gate_weight(self) -> None:
        return None


class Ours(BenchLayer):
    """moe_lvlm's MoELayer with the router that `config` names."""

    def __init__(
        self,
        problem: Problem,
        router: Router,
        context: RoutingContext | None,
        *,
        dispatcher: Dispatcher | None = None,
        held: slice = slice(None),
    ) -> None:
        """held: the experts that are here; all of them unless a dispatcher brings rows to the others."""
        super().__init__()
        sizes = problem.sizes
        w1_EFD = problem.w1_EFD[held]
        experts = Experts(
            num_experts=len(w1_EFD), model_width=sizes.model_width, ffn_width=sizes.ffn_width, activation="silu"
        )
        assert experts.w3 is not None
        self.layer = MoELayer(router=router, experts=experts, site=Site("bench", 0), dispatcher=dispatcher)
        self.layer.to(device=problem.x_BSD.device, dtype=problem.x_BSD.dtype)
        self.context = context
        with torch.no_grad():
            router.gate.weight.copy_(problem.gate_ED)
            experts.w1.copy_(w1_EFD)
            experts.w2.copy_(problem.w2_EDF[held])
            experts.w3.copy_(problem.w3_EFD[held])

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.layer(x_BSD, self.context)

    @property
    def gate_weight(self) -> Tensor:
        return self.layer.router.gate.weight


class _AllExpertsRouter(LongTailRouter):
    """LTDR's decision, carried out by computing all experts for all tokens, most of them with weight 0."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = super().forward(x_TD, context)
        return decision._replace(keep_RK=torch.ones_like(decision.keep_RK))


def ours_top_k(problem: Problem) -> BenchLayer:
    """Ours, plain top-k."""
    return _ours(problem, TopKRouterSettings())


def ours_expert_parallel(problem: Problem, group: dist.ProcessGroup, *, rank: int, size: int) -> BenchLayer:
    """Ours, plain top-k, with rank `rank` of `size` holding its share of the experts; on one process without a group."""
    sizes = problem.sizes
    router = build_router(
        model_width=sizes.model_width,
        config=MoEConfig(num_experts=sizes.experts, top_k=sizes.top_k, router=TopKRouterSettings()),
    )
    if size == 1:
        return Ours(problem, router, context=None)
    share = sizes.experts // size
    held = slice(rank * share, (rank + 1) * share)
    return Ours(problem, router, context=None, dispatcher=AllToAllDispatcher(group), held=held)


def ours_conflict(problem: Problem) -> BenchLayer:
    """Ours, STGC: top-k, whose backward pass looks for tokens in conflict with their expert."""
    return _ours(problem, ConflictRouterSettings())


def ours_dynamic(problem: Problem) -> BenchLayer:
    """Ours, DynMoE's top-any: with random scores a token takes half of the experts on average."""
    return _ours(problem, DynamicRouterSettings())


def _ours(problem: Problem, router: TopKRouterSettings | ConflictRouterSettings | DynamicRouterSettings) -> BenchLayer:
    config = MoEConfig(num_experts=problem.sizes.experts, top_k=problem.sizes.top_k, router=router)
    return Ours(problem, build_router(model_width=problem.sizes.model_width, config=config), context=None)


def _long_tail_config(problem: Problem) -> MoEConfig:
    return MoEConfig(
        num_experts=problem.sizes.experts, top_k=problem.sizes.top_k, router=LongTailRouterSettings(tail_k=None)
    )


def ours_long_tail(problem: Problem) -> BenchLayer:
    """Ours, LTDR: the tail's tokens on all experts."""
    router = build_router(model_width=problem.sizes.model_width, config=_long_tail_config(problem))
    return Ours(problem, router, context=problem.context)


def ours_long_tail_masked(problem: Problem) -> BenchLayer:
    """LTDR as it is without a variable number of experts a token: all experts for all, then a mask."""
    router = _AllExpertsRouter(model_width=problem.sizes.model_width, config=_long_tail_config(problem))
    return Ours(problem, router, context=problem.context)
