"""Nobody times wrong code: each variant is compared with a plain computation first.

T tokens   D model width   E experts   F FFN width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from bench.problem import Problem, routing_probabilities
from bench.rivals import UnavailableError
from bench.variants import Variant
from moe_lvlm.routing import Modality

CHECK_TOKENS = 256
FP32_TOLERANCE = 1e-4
# bf16 has 8 bits: errors are held against the largest value, and a few tokens may tie otherwise in the gate
BF16_TOLERANCE = 0.05
BF16_TOKENS_WITHIN = 0.95


class CheckError(ValueError):
    """A variant does not compute what it should."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Output and gradients of one forward and backward pass."""

    output_TD: Tensor
    grad_x_TD: Tensor
    grad_gate_ED: Tensor | None


def check_variants(variants: tuple[Variant, ...], problem: Problem, *, is_compared: bool = True) -> dict[str, str]:
    """Compare outputs and gradients on a problem of few tokens (`CHECK_TOKENS` do); the reasons of the variants that
    cannot run are returned.

    Baselines that drop tokens get a capacity at which they drop none. Without `is_compared` the variants only run.

    Raises:
        CheckError: a result is wrong. Any error in a variant of ours also comes through.
    """
    problem = problem.with_capacity(float(problem.sizes.experts))
    expected = {kind: _plain(problem, kind) for kind in {variant.computes for variant in variants}}
    unavailable: dict[str, str] = {}
    for variant in variants:
        try:
            outcome = _run(variant, problem)
        except UnavailableError as error:
            unavailable[variant.name] = str(error)
            continue
        except (RuntimeError, NotImplementedError) as error:
            if variant.is_ours or variant.computes != "top_k":
                raise
            unavailable[variant.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if is_compared:
            _compare(variant.name, outcome, expected[variant.computes], problem.x_BSD.dtype)
    return unavailable


def _run(variant: Variant, problem: Problem) -> Outcome:
    layer = variant.build(problem)
    layer.train()
    x_BSD = problem.x_BSD.clone().requires_grad_()
    output_BSD = layer(x_BSD)
    output_BSD.backward(problem.grad_BSD)
    assert x_BSD.grad is not None
    grad_gate_ED = None if layer.gate_weight is None else layer.gate_weight.grad
    return Outcome(output_BSD.detach()[0], x_BSD.grad[0], grad_gate_ED)


def _plain(problem: Problem, computes: str) -> Outcome:
    """The function itself, in float32: every expert for every token, weighted by a table of weights [T, E]."""
    x_TD = problem.x_BSD[0].float().clone().requires_grad_()
    gate_ED = problem.gate_ED.float().clone().requires_grad_()
    w1_EFD, w2_EDF, w3_EFD = problem.w1_EFD.float(), problem.w2_EDF.float(), problem.w3_EFD.float()
    if computes == "dense":
        weights_TE = x_TD.new_zeros(x_TD.shape[0], problem.sizes.experts)
        weights_TE[:, : problem.sizes.top_k] = 1
    elif computes == "dynamic":
        weights_TE = _top_any_weights(x_TD, gate_ED)
    else:
        weights_TE = _plain_weights(x_TD, gate_ED, problem, has_tail=computes == "ltdr")
    output_TD = torch.zeros_like(x_TD)
    for expert in range(problem.sizes.experts):
        hidden_TF = silu(x_TD @ w1_EFD[expert].T) * (x_TD @ w3_EFD[expert].T)
        output_TD = output_TD + weights_TE[:, expert, None] * (hidden_TF @ w2_EDF[expert].T)
    output_TD.backward(problem.grad_BSD[0].float())
    assert x_TD.grad is not None
    return Outcome(output_TD.detach(), x_TD.grad, gate_ED.grad)


def _plain_weights(x_TD: Tensor, gate_ED: Tensor, problem: Problem, *, has_tail: bool) -> Tensor:
    """Softmax over all experts, the best `top_k` kept (all of them in LTDR's tail), over their sum."""
    probs_TE = routing_probabilities(x_TD, gate_ED)
    is_kept_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    is_kept_TE.scatter_(1, probs_TE.topk(problem.sizes.top_k, dim=-1).indices, True)
    if has_tail and problem.sizes.num_tail:
        is_vision_T = problem.context.modality_T == Modality.VISION
        variance_T = probs_TE.detach().var(dim=-1, unbiased=False)
        is_tail_T = is_vision_T & (variance_T > variance_T[is_vision_T].mean())
        if int(is_tail_T.sum()) != problem.sizes.num_tail:
            raise CheckError(f"LTDR's tail has {int(is_tail_T.sum())} tokens, not {problem.sizes.num_tail}")
        is_kept_TE |= is_tail_T[:, None]
    kept_TE = probs_TE * is_kept_TE
    return kept_TE / kept_TE.sum(dim=-1, keepdim=True)


def _top_any_weights(x_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """Experts whose cosine is above a threshold of 0, averaged; backwards their sigmoid stands for the choice."""
    cosine_TE = normalize(x_TD, dim=-1) @ normalize(gate_ED, dim=-1).T
    margin_TE = cosine_TE.sigmoid() - 0.5
    is_kept_TE = cosine_TE > 0
    count_T1 = is_kept_TE.sum(dim=-1, keepdim=True).clamp_min(1)
    return is_kept_TE * (1 + margin_TE - margin_TE.detach()) / count_T1


def _compare(name: str, outcome: Outcome, expected: Outcome, dtype: torch.dtype) -> None:
    pairs = [("output", outcome.output_TD, expected.output_TD), ("x.grad", outcome.grad_x_TD, expected.grad_x_TD)]
    if outcome.grad_gate_ED is not None and expected.grad_gate_ED is not None:
        pairs.append(("gate.grad", outcome.grad_gate_ED, expected.grad_gate_ED))
    for what, value, target in pairs:
        error_T = (value.float() - target).abs().amax(dim=-1)
        largest = max(1.0, float(target.abs().max()))
        if dtype == torch.float32:
            tolerance, error = FP32_TOLERANCE * largest, float(error_T.max())
        elif what == "gate.grad":
            continue  # a sum over all tokens, those that tie otherwise included
        else:
            tolerance, error = BF16_TOLERANCE * largest, float(error_T.quantile(BF16_TOKENS_WITHIN))
        if not error <= tolerance:
            raise CheckError(
                f"{name}: {what} is off by {error:.3g} from the plain computation; allowed: {tolerance:.3g}"
            )
