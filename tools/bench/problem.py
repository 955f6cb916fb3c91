"""What every variant is given: the sizes, one set of weights, one input.

T tokens   D model width   E experts   F FFN width   K experts a token
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_lvlm.routing import Modality, RoutingContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# of the gate's weights, as DeepSpeed and most models draw them; then scaled, see `draw_problem`
GATE_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one layer and its input.

    tail_share: share of all tokens that LTDR's variants send to all experts.
    capacity_factor: of the baselines that drop tokens; an expert takes capacity_factor * K * T / E rows.
    """

    tokens: int
    model_width: int
    ffn_width: int
    experts: int
    top_k: int
    tail_share: float
    capacity_factor: float = 1.5

    def __post_init__(self) -> None:
        for name in ("tokens", "model_width", "ffn_width", "experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; allowed: 1 and above")
        if self.top_k > self.experts:
            raise ValueError(f"top_k: {self.top_k}; allowed: 1 to experts ({self.experts})")
        if not 0 <= self.tail_share < 1:
            raise ValueError(f"tail_share: {self.tail_share}; allowed: 0 to below 1")

    @property
    def num_tail(self) -> int:
        """Tokens that use all experts under LTDR."""
        return round(self.tail_share * self.tokens)

    def saved_floor_mib(self, dtype: torch.dtype) -> float:
        """The least that a backward pass of top-k experts needs: the input, and gate and up of every assignment."""
        numbers = self.tokens * self.model_width + 2 * self.tokens * self.top_k * self.ffn_width
        return numbers * dtype.itemsize / 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Weights and data, in one type on one device. No variant writes into them.

    context: marks as vision such tokens that LTDR's rule finds exactly `sizes.num_tail` of them in the tail.
    """

    sizes: Sizes
    gate_ED: Tensor
    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor
    x_BSD: Tensor
    grad_BSD: Tensor
    context: RoutingContext

    def with_capacity(self, factor: float) -> Problem:
        """The same problem with another capacity of the baselines that drop tokens."""
        return replace(self, sizes=replace(self.sizes, capacity_factor=factor))

    def first_tokens(self, limit: int) -> Problem:
        """The same with `limit` tokens at most, and the same share of them in LTDR's tail."""
        sizes = replace(self.sizes, tokens=min(self.sizes.tokens, limit))
        x_BSD = self.x_BSD[:, : sizes.tokens].contiguous()
        return replace(
            self,
            sizes=sizes,
            x_BSD=x_BSD,
            grad_BSD=self.grad_BSD[:, : sizes.tokens].contiguous(),
            context=tail_context(routing_probabilities(x_BSD[0], self.gate_ED), sizes.num_tail),
        )


def draw_problem(sizes: Sizes, *, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """Random weights, input and output gradient.

    The gate is drawn from N(0, 0.02) and scaled so that its logits have unit variance for every model width: neither
    all alike, nor one expert for all. Numbers are drawn in float32 on the CPU, so both types see the same ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device=device, dtype=dtype)

    T, D, E, F = sizes.tokens, sizes.model_width, sizes.experts, sizes.ffn_width
    gate_ED = normal(E, D, std=GATE_STD * (1 / (GATE_STD * math.sqrt(D))))
    x_BSD = normal(1, T, D)
    return Problem(
        sizes=sizes,
        gate_ED=gate_ED,
        w1_EFD=normal(E, F, D, std=D**-0.5),
        w2_EDF=normal(E, D, F, std=F**-0.5),
        w3_EFD=normal(E, F, D, std=D**-0.5),
        x_BSD=x_BSD,
        grad_BSD=normal(1, T, D),
        context=tail_context(routing_probabilities(x_BSD[0], gate_ED), sizes.num_tail),
    )


def with_load(problem: Problem, share: float | None, *, seed: int) -> Problem:
    """The same problem with inputs and a gate that set how many tokens want expert 0: `share` of them, or K / E (None).

    All other choices are spread evenly by chance. The gate reads the first E numbers of a token, and each token's are
    put into the order of its choice: they stay the random numbers that they were, and no routing code is told anything.

    Raises:
        ValueError: share outside 0 to 1, or tokens that cannot do without expert 0; D below E.
    """
    sizes = problem.sizes
    T, E, K = sizes.tokens, sizes.experts, sizes.top_k
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share of tokens on one expert: {share}; allowed: 0 to 1")
    if share is not None and share < 1 and K == E:
        raise ValueError(f"share of tokens on one expert: {share} with top_k {K} of {E} experts; allowed: 1")
    generator = torch.Generator().manual_seed(seed)
    preference_TE = torch.rand(T, E, generator=generator)
    if share is not None:
        preference_TE[:, 0] = torch.where(torch.randperm(T, generator=generator) < round(share * T), 2.0, -1.0)
    is_chosen_TE = torch.zeros(T, E).scatter_(1, preference_TE.topk(K, dim=-1).indices, 1.0)
    # the chosen change places with each other, or expert 0 would always be the first
    preference_TE = is_chosen_TE + 0.5 * torch.rand(T, E, generator=generator)
    largest_TE = problem.x_BSD[0, :, :E].sort(dim=-1, descending=True).values
    return _with_scores(problem, largest_TE, preference_TE)


def with_tail(problem: Problem, share: float, *, seed: int) -> Problem:
    """The same problem, in which `share` of the tokens are LTDR's tail: all tokens are vision, and their scores have one
    of two spreads. The load is even, `sizes.tail_share` the share.

    `tail_context` finds a tail among random scores, but not one of half of the tokens.

    Raises:
        ValueError: D below E.
    """
    sizes = replace(problem.sizes, tail_share=share)
    T, E = sizes.tokens, sizes.experts
    generator = torch.Generator().manual_seed(seed)
    is_tail_T = torch.randperm(T, generator=generator) < sizes.num_tail
    scores_TE = torch.where(is_tail_T, 1.5, 0.375)[:, None] * torch.linspace(1, -1, E)
    routed = _with_scores(problem, scores_TE.to(problem.x_BSD), torch.rand(T, E, generator=generator))
    return replace(routed, sizes=sizes, context=_context(torch.ones(T, dtype=torch.bool, device=problem.x_BSD.device)))


def _with_scores(problem: Problem, scores_TE: Tensor, preference_TE: Tensor) -> Problem:
    """A gate that reads the first E numbers of a token, which are its scores (descending) in the order of preference."""
    D, E = problem.sizes.model_width, problem.sizes.experts
    if D < E:
        raise ValueError(f"model_width: {D} with {E} experts whose load is set; allowed: {E} and above")
    order_TE = preference_TE.argsort(dim=-1, descending=True).to(scores_TE.device)
    x_BSD = problem.x_BSD.clone()
    x_BSD[0, :, :E] = torch.empty_like(scores_TE).scatter_(1, order_TE, scores_TE)
    gate_ED = torch.zeros_like(problem.gate_ED)
    gate_ED[:, :E] = torch.eye(E, dtype=gate_ED.dtype, device=gate_ED.device)
    return replace(problem, x_BSD=x_BSD, gate_ED=gate_ED)


def routing_probabilities(x_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """Float32 [T, E]: softmax of the gate's scores."""
    return torch.softmax(x_TD.float() @ gate_ED.float().T, dim=-1)


def tail_context(probs_TE: Tensor, num_tail: int) -> RoutingContext:
    """A context in which the rule `variance of the probabilities > mean over vision tokens` picks `num_tail` tokens.

    The rule depends on the vision tokens themselves, so these are chosen: the num_tail tokens of highest variance,
    and as many of the lowest as bring the mean between the two. All others are language.

    Raises:
        ValueError: no such choice exists (too few tokens, or all alike).
    """
    num_tokens = probs_TE.shape[0]
    is_vision_T = torch.zeros(num_tokens, dtype=torch.bool, device=probs_TE.device)
    if num_tail:
        variance_T, order_T = probs_TE.var(dim=-1, unbiased=False).sort(descending=True)
        num_low = _low_tokens(variance_T.double(), num_tail)
        is_vision_T[order_T[:num_tail]] = True
        is_vision_T[order_T[num_tokens - num_low :]] = True
    return _context(is_vision_T)


def _context(is_vision_T: Tensor) -> RoutingContext:
    """One image and one sample; tokens that are not vision are language."""
    modality_T = torch.where(is_vision_T, int(Modality.VISION), int(Modality.LANGUAGE)).to(torch.int8)
    return RoutingContext(
        modality_BS=modality_T[None],
        image_BS=torch.where(is_vision_T, 0, -1).to(torch.int32)[None],
        sample_BS=torch.zeros_like(modality_T, dtype=torch.int32)[None],
    )


def _low_tokens(variance_T: Tensor, num_tail: int) -> int:
    """How many of the last (lowest) tokens, beside the first num_tail, put the mean well between the two groups."""
    high_sum = variance_T[:num_tail].sum()
    lowest_high = variance_T[num_tail - 1]
    low_T = variance_T[num_tail:].flip(0)
    count_L = torch.arange(1, low_T.numel() + 1, device=low_T.device)
    mean_L = (high_sum + low_T.cumsum(0)) / (num_tail + count_L)
    # the margin to the nearer group, relative to the mean, so that rounding cannot move a token over it
    margin_L = torch.minimum(lowest_high - mean_L, mean_L - low_T) / mean_L
    if low_T.numel() == 0 or margin_L.max() <= 1e-4:
        raise ValueError(
            f"tail_share: no choice of vision tokens among {variance_T.numel()} has exactly {num_tail} in the tail; "
            "allowed: a smaller share, or more tokens"
        )
    return int(margin_L.argmax()) + 1
