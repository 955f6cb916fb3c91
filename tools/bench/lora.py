"""One frozen linear with adapters: what is compared, and a plain computation of each.

B batch (one sample a row)   S sequence   D inputs   O outputs   E experts (without the universal one)   r rank
G width of an embedding
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.check import CheckError
from bench.rivals import UnavailableError
from bench.variants import DENSE
from moe_lvlm.adapters.facts import BatchFacts
from moe_lvlm.adapters.linear import LoRAExpertLinear, LoRALinear
from moe_lvlm.config.adapter import Gating, LoRASettings, MoCLESettings
from moe_lvlm.routing import RoutingContext, Site

EMBEDDING_WIDTH = 384
TEMPERATURE = 0.05
SITE = Site("bench", 0)
# of the largest value; bf16 has 8 bits
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRASizes:
    """Of one linear, its adapter and its input."""

    batch: int
    sequence: int
    inputs: int
    outputs: int
    experts: int
    rank: int

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; allowed: 1 and above")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAProblem:
    """Weights and data, in one type on one device. No variant writes into them.

    lora_a_ErD, lora_b_EOr: E + 1 pairs, the universal one last. context: each row of the batch is a sample, and the
    samples' embeddings spread over the experts.
    """

    sizes: LoRASizes
    weight_OD: Tensor
    lora_a_ErD: Tensor
    lora_b_EOr: Tensor
    gate_EG: Tensor
    token_gate_ED: Tensor
    context: RoutingContext
    x_BSD: Tensor
    grad_BSD: Tensor

    @property
    def embedding_BG(self) -> Tensor:
        assert self.context.embedding_NG is not None
        return self.context.embedding_NG

    def settings(self, *, gating: Gating = "cluster", top_k: int = 1) -> MoCLESettings:
        """Of the adapter; no noise, which a plain computation would have to know."""
        return MoCLESettings(
            num_experts=self.sizes.experts,
            rank=self.sizes.rank,
            has_universal=top_k == 1,
            top_k=top_k,
            gating=gating,
            temperature=TEMPERATURE if gating == "cluster" else 1.0,
            noise=0.0,
            embedding_width=EMBEDDING_WIDTH,
        )

    def small(self) -> LoRAProblem:
        """The same with a few tokens, for the check."""
        sequence = min(self.sizes.sequence, 16)
        return replace(
            self,
            sizes=replace(self.sizes, sequence=sequence),
            context=one_sample_a_row(self.sizes.batch, sequence, self.embedding_BG),
            x_BSD=self.x_BSD[:, :sequence].contiguous(),
            grad_BSD=self.grad_BSD[:, :sequence].contiguous(),
        )


def draw_lora_problem(sizes: LoRASizes, *, dtype: torch.dtype, device: torch.device, seed: int) -> LoRAProblem:
    """Random weights, input and output gradient, drawn in float32 on the CPU so that both types see the same ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device=device, dtype=dtype)

    E, r, D, O = sizes.experts, sizes.rank, sizes.inputs, sizes.outputs  # noqa: E741
    embedding_BG = normal(sizes.batch, EMBEDDING_WIDTH, std=EMBEDDING_WIDTH**-0.5)
    return LoRAProblem(
        sizes=sizes,
        weight_OD=normal(O, D, std=D**-0.5),
        lora_a_ErD=normal(E + 1, r, D, std=D**-0.5),
        lora_b_EOr=normal(E + 1, O, r, std=0.1),
        gate_EG=normal(E, EMBEDDING_WIDTH, std=0.1),
        token_gate_ED=normal(E, D, std=D**-0.5),
        context=one_sample_a_row(sizes.batch, sizes.sequence, embedding_BG),
        x_BSD=normal(sizes.batch, sizes.sequence, D),
        grad_BSD=normal(sizes.batch, sizes.sequence, O),
    )


def one_sample_a_row(batch: int, sequence: int, embedding_BG: Tensor) -> RoutingContext:
    """Rows without padding, counted beforehand as a model's forward does it."""
    context = RoutingContext.all_language((batch, sequence), embedding_BG.device)
    return replace(context, embedding_NG=embedding_BG, is_packed=False)


class LoRALayer(nn.Module, ABC):
    """One variant: [B, S, D] -> [B, S, O]. The base is frozen."""

    @abstractmethod
    def forward(self, x_BSD: Tensor) -> Tensor: ...


def _frozen(problem: LoRAProblem) -> nn.Linear:
    linear = nn.Linear(problem.sizes.inputs, problem.sizes.outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight_OD, requires_grad=False)
    return linear


class FrozenFloor(LoRALayer):
    """The linear alone."""

    def __init__(self, problem: LoRAProblem) -> None:
        super().__init__()
        self.linear = _frozen(problem)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.linear(x_BSD)


class OurLoRA(LoRALayer):
    """moe_lvlm's single LoRA."""

    def __init__(self, problem: LoRAProblem) -> None:
        super().__init__()
        self.linear = LoRALinear(_frozen(problem), LoRASettings(rank=problem.sizes.rank), SITE)
        with torch.no_grad():
            self.linear.lora_A.copy_(problem.lora_a_ErD[:1])
            self.linear.lora_B.copy_(problem.lora_b_EOr[:1])

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.linear(x_BSD)


class OurExperts(LoRALayer):
    """moe_lvlm's LoRA experts."""

    def __init__(self, problem: LoRAProblem, settings: MoCLESettings) -> None:
        super().__init__()
        self.linear = LoRAExpertLinear(_frozen(problem), settings, SITE)
        self.linear.facts = BatchFacts(problem.context, None)
        num_pairs = self.linear.lora_A.shape[0]
        with torch.no_grad():
            self.linear.lora_A.copy_(problem.lora_a_ErD[:num_pairs])
            self.linear.lora_B.copy_(problem.lora_b_EOr[:num_pairs])
            self.linear.gate.weight.copy_(problem.gate_EG if settings.reads_table else problem.token_gate_ED)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.linear(x_BSD)


class _Rival(LoRALayer):
    """MoCLE's function (eq. 3) with plain operations. gates_BE: as the paper has them, 0 but for the best."""

    def __init__(self, problem: LoRAProblem) -> None:
        super().__init__()
        self.linear = _frozen(problem)
        self.lora_A = nn.Parameter(problem.lora_a_ErD.clone())
        self.lora_B = nn.Parameter(problem.lora_b_EOr.clone())
        self.gate = nn.Parameter(problem.gate_EG.clone())
        self.embedding_BG = problem.embedding_BG
        self.scale = problem.settings().scale

    def gates(self) -> tuple[Tensor, Tensor]:
        """(best expert [B], its gate [B])."""
        probs_BE = ((self.embedding_BG.float() @ self.gate.float().t()) / TEMPERATURE).softmax(dim=-1)
        gate_B, expert_B = probs_BE.max(dim=-1)
        return expert_B, gate_B


class GatheredPairs(_Rival):
    """A gathered bmm for the sample's expert, and a product for the universal one, each at the width of the outputs."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        expert_B, gate_B = self.gates()
        a_BrD, b_BOr = self.lora_A[expert_B], self.lora_B[expert_B]
        task_BSO = torch.bmm(torch.bmm(x_BSD, a_BrD.transpose(1, 2)), b_BOr.transpose(1, 2))
        universal_BSO = x_BSD @ self.lora_A[-1].t() @ self.lora_B[-1].t()
        gate_B11 = gate_B[:, None, None].to(x_BSD.dtype)
        return self.linear(x_BSD) + self.scale * (gate_B11 * task_BSO + (1 - gate_B11) * universal_BSO)


class AllExpertsMasked(_Rival):
    """Every expert for every sample, most of them times 0: how public code for LoRA experts does it."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        expert_B, gate_B = self.gates()
        gates_BE = torch.zeros(len(expert_B), self.gate.shape[0], device=x_BSD.device)
        gates_BE = gates_BE.scatter(1, expert_B[:, None], gate_B[:, None])
        weights_BE = torch.cat((gates_BE, 1 - gate_B[:, None]), dim=1).to(x_BSD.dtype)
        out_BSO = self.linear(x_BSD)
        for expert in range(self.lora_A.shape[0]):
            expert_BSO = x_BSD @ self.lora_A[expert].t() @ self.lora_B[expert].t()
            out_BSO = out_BSO + weights_BE[:, expert, None, None] * self.scale * expert_BSO
        return out_BSO


class PeftLoRA(LoRALayer):
    """PEFT's single LoRA."""

    def __init__(self, problem: LoRAProblem) -> None:
        super().__init__()
        try:
            from peft.tuners.lora import LoraConfig
            from peft.tuners.lora.layer import Linear
        except ImportError as error:
            raise UnavailableError(f"peft is not installed ({error})") from error
        settings = LoRASettings(rank=problem.sizes.rank)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0)
        self.linear = Linear(
            _frozen(problem), "default", config=config, r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0
        )
        self.linear.to(problem.x_BSD.dtype)
        with torch.no_grad():
            self.linear.lora_A["default"].weight.copy_(problem.lora_a_ErD[0])
            self.linear.lora_B["default"].weight.copy_(problem.lora_b_EOr[0])

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.linear(x_BSD)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAVariant:
    """One row of the comparison. plain: its output by a plain computation, which it is held to."""

    name: str
    label: str
    build: Callable[[LoRAProblem], LoRALayer]
    plain: Callable[[LoRAProblem, Tensor], Tensor]
    is_ours: bool = False


def _plain_base(problem: LoRAProblem, x_BSD: Tensor) -> Tensor:
    return x_BSD @ problem.weight_OD.t()


def _plain_lora(problem: LoRAProblem, x_BSD: Tensor) -> Tensor:
    lora = x_BSD @ (problem.lora_b_EOr[0] @ problem.lora_a_ErD[0]).t()
    return _plain_base(problem, x_BSD) + problem.settings().scale * lora


def _plain_experts(problem: LoRAProblem, x_BSD: Tensor, settings: MoCLESettings) -> Tensor:
    """Each sample's (or token's) own matrix, made in full."""
    if settings.reads_table:
        scores = (problem.embedding_BG.float() @ problem.gate_EG.float().t())[:, None].expand(*x_BSD.shape[:2], -1)
    else:
        scores = x_BSD.float() @ problem.token_gate_ED.float().t()
    probs_BSE = (scores / settings.temperature).softmax(dim=-1)
    lowest_BS1 = probs_BSE.topk(settings.top_k, dim=-1).values[..., -1:]
    weights_BSE = torch.where(probs_BSE >= lowest_BS1, probs_BSE, 0.0)
    if settings.has_universal:
        weights_BSE = torch.cat((weights_BSE, 1 - weights_BSE.amax(dim=-1, keepdim=True)), dim=-1)
    out = _plain_base(problem, x_BSD)
    for expert in range(weights_BSE.shape[-1]):
        full_OD = problem.lora_b_EOr[expert] @ problem.lora_a_ErD[expert]
        out = out + weights_BSE[..., expert, None].to(x_BSD.dtype) * settings.scale * (x_BSD @ full_OD.t())
    return out


def _experts(name: str, label: str, *, gating: Gating = "cluster", top_k: int = 1) -> LoRAVariant:
    return LoRAVariant(
        name=name,
        label=label,
        build=lambda problem: OurExperts(problem, problem.settings(gating=gating, top_k=top_k)),
        plain=lambda problem, x: _plain_experts(problem, x, problem.settings(gating=gating, top_k=top_k)),
        is_ours=True,
    )


def _mocle(problem: LoRAProblem, x_BSD: Tensor) -> Tensor:
    return _plain_experts(problem, x_BSD, problem.settings())


LORA_VARIANTS: tuple[LoRAVariant, ...] = (
    LoRAVariant(name=DENSE, label="the frozen linear alone", build=FrozenFloor, plain=_plain_base),
    LoRAVariant(name="lora", label="moe_lvlm, single LoRA", build=OurLoRA, plain=_plain_lora, is_ours=True),
    _experts("mocle", "moe_lvlm, MoCLE (cluster gating, universal expert)"),
    _experts("mocle_top2", "moe_lvlm, top-2 without a universal expert", top_k=2),
    _experts("mocle_token", "moe_lvlm, token gating, universal expert", gating="token"),
    LoRAVariant(name="gathered", label="MoCLE, a gathered bmm an expert", build=GatheredPairs, plain=_mocle),
    LoRAVariant(name="masked", label="MoCLE, all experts masked", build=AllExpertsMasked, plain=_mocle),
    LoRAVariant(name="peft", label="PEFT, single LoRA", build=PeftLoRA, plain=_plain_lora),
)


def choose_lora(names: str | None, sizes: LoRASizes) -> tuple[LoRAVariant, ...]:
    """The variants named, and the floor; None means all that the sizes allow.

    Raises:
        ValueError: an unknown name.
    """
    known = {variant.name: variant for variant in LORA_VARIANTS}
    if names is None:
        return tuple(one for one in LORA_VARIANTS if sizes.experts > 1 or one.name != "mocle_top2")
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ValueError(f"--variants: {name!r}; allowed: {', '.join(known)}")
    return tuple(one for one in LORA_VARIANTS if one.name == DENSE or one.name in wanted)


def check_lora(variants: tuple[LoRAVariant, ...], problem: LoRAProblem, *, is_compared: bool = True) -> dict[str, str]:
    """Hold output and input gradient of each to its plain computation; reasons of those that cannot run come back.
    Without `is_compared` that is all.

    Raises:
        CheckError: a result is wrong.
    """
    small = problem.small()
    unavailable = {}
    for variant in variants:
        try:
            layer = variant.build(small).train()
        except UnavailableError as error:
            unavailable[variant.name] = str(error)
            continue
        if not is_compared:
            continue
        found = _outcome(layer, small)
        expected = _outcome(lambda x, plain=variant.plain: plain(small, x), small)
        for what, one, other in zip(("output", "gradient of the input"), found, expected, strict=True):
            error = float((one - other).abs().max() / other.abs().max())
            if not error <= TOLERANCES[small.x_BSD.dtype]:
                raise CheckError(f"{variant.name}: {what} is off by {error:.2e} of the largest value")
    return unavailable


def _outcome(function: Callable[[Tensor], Tensor], problem: LoRAProblem) -> tuple[Tensor, Tensor]:
    x_BSD = problem.x_BSD.detach().requires_grad_()
    out_BSO = function(x_BSD)
    out_BSO.backward(problem.grad_BSD)
    assert x_BSD.grad is not None
    return out_BSO.detach().float(), x_BSD.grad.float()
