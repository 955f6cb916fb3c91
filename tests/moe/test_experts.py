"""The grouped computation of experts, against a plain differentiable loop in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from moe_lvlm.moe.experts import Experts
from tests.moe.tables import sorted_rows

# The functions as torch has them, not as transformers names them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
# expert 1 has no row
COUNTS = (3, 0, 4, 1)


def make_experts(
    *, activation: str = "silu", is_gated: bool = True, has_bias: bool = False, width: int = 5, ffn_width: int = 7
) -> Experts:
    experts = Experts(
        num_experts=len(COUNTS),
        model_width=width,
        ffn_width=ffn_width,
        activation=activation,
        is_gated=is_gated,
        has_bias=has_bias,
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def make_rows(counts: tuple[int, ...] = COUNTS, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_RD = torch.randn(sum(counts), width, generator=generator, dtype=torch.float64).requires_grad_()
    weights_R = torch.rand(sum(counts), generator=generator, dtype=torch.float64).requires_grad_()
    return x_RD, weights_R


def plain_loop(experts: Experts, activation: str, x_RD: Tensor, weights_R: Tensor, counts: tuple[int, ...]) -> Tensor:
    """One row at a time: weight x (w2 (act(w1 x + b1) * (w3 x + b3)) + b2)."""
    expert_R = [expert for expert, count in enumerate(counts) for _ in range(count)]
    outputs = []
    for row, expert in enumerate(expert_R):
        hidden = experts.w1[expert] @ x_RD[row]
        hidden = ACTIVATIONS[activation](hidden if experts.b1 is None else hidden + experts.b1[expert])
        if experts.w3 is not None:
            up = experts.w3[expert] @ x_RD[row]
            hidden = hidden * (up if experts.b3 is None else up + experts.b3[expert])
        out = experts.w2[expert] @ hidden
        outputs.append(weights_R[row] * (out if experts.b2 is None else out + experts.b2[expert]))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("activation", "is_gated", "has_bias"), list(itertools.product(ACTIVATIONS, (True, False), (True, False)))
)
def test_outputs_and_all_gradients_equal_a_plain_loop(activation: str, is_gated: bool, has_bias: bool) -> None:
    experts = make_experts(activation=activation, is_gated=is_gated, has_bias=has_bias)
    x_RD, weights_R = make_rows()
    out_RD = experts(sorted_rows(x_RD, weights_R, COUNTS))
    expected_RD = plain_loop(experts, activation, x_RD, weights_R, COUNTS)
    assert_close(out_RD, expected_RD)

    inputs = {"x": x_RD, "weights": weights_R, **dict(experts.named_parameters())}
    names = {"w1", "w2"} | ({"w3"} if is_gated else set()) | ({"b1", "b2"} if has_bias else set())
    assert set(inputs) == {"x", "weights"} | names | ({"b3"} if is_gated and has_bias else set())
    upstream = torch.randn(out_RD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(out_RD, list(inputs.values()), upstream)
    expected_grads = torch.autograd.grad(expected_RD, list(inputs.values()), upstream)
    for name, grad, expected in zip(inputs, grads, expected_grads, strict=True):
        # the gradient of a weight is summed in float32, as all of the router's numbers are
        tolerance: dict[str, Any] = (
            {"atol": 1e-5, "rtol": 1e-5} if name == "weights" else {"atol": 1e-10, "rtol": 1e-10}
        )
        assert_close(grad, expected, msg=name, **tolerance)


@pytest.mark.parametrize(("is_gated", "has_bias"), list(itertools.product((True, False), (True, False))))
def test_gradcheck(is_gated: bool, has_bias: bool) -> None:
    counts = (2, 0, 1, 1)
    experts = make_experts(activation="gelu_new", is_gated=is_gated, has_bias=has_bias, width=3, ffn_width=2)
    names = [name for name, _ in experts.named_parameters()]

    def compute(x_RD: Tensor, weights_R: Tensor, *parameters: Tensor) -> Tensor:
        rows = sorted_rows(x_RD, weights_R, counts)
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), (rows,))

    x_RD, weights_R = make_rows(counts, width=3)
    # gradients of weights are summed in float32, as the router's numbers are
    assert torch.autograd.gradcheck(compute, (x_RD, weights_R, *experts.parameters()), atol=1e-4)


def test_an_expert_without_rows_has_a_gradient_of_zero() -> None:
    experts = make_experts(has_bias=True)
    experts(sorted_rows(*make_rows(), COUNTS)).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad[1].abs().sum() == 0, name
        assert all(parameter.grad[expert].abs().sum() > 0 for expert in (0, 2, 3)), name


def test_no_row_at_all_still_gives_every_gradient() -> None:
    experts = make_experts(has_bias=True)
    x_RD, weights_R = make_rows((0, 0, 0, 0))
    out_RD = experts(sorted_rows(x_RD, weights_R, (0, 0, 0, 0)))
    assert out_RD.shape == (0, 5)
    out_RD.sum().backward()
    assert x_RD.grad is not None
    assert weights_R.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in experts.parameters())


@pytest.mark.parametrize("frozen", ["w1", "w2", "w3", "b1", "b2", "b3"])
def test_a_frozen_parameter_leaves_the_other_gradients_as_they_are(frozen: str) -> None:
    experts = make_experts(has_bias=True)
    experts(sorted_rows(*make_rows(), COUNTS)).sum().backward()
    expected = {name: parameter.grad for name, parameter in experts.named_parameters()}
    experts.zero_grad()
    experts.get_parameter(frozen).requires_grad_(False)
    experts(sorted_rows(*make_rows(), COUNTS)).sum().backward()
    for name, parameter in experts.named_parameters():
        if name == frozen:
            assert parameter.grad is None
        else:
            assert_close(parameter.grad, expected[name])


def test_frozen_experts_pass_the_gradient_on() -> None:
    experts = make_experts(has_bias=True)
    x_RD, weights_R = make_rows()
    plain_loop(experts, "silu", x_RD, weights_R, COUNTS).sum().backward()
    expected_x, expected_weights = x_RD.grad, weights_R.grad
    experts.requires_grad_(False)
    x_RD, weights_R = make_rows()
    experts(sorted_rows(x_RD, weights_R, COUNTS)).sum().backward()
    assert_close(x_RD.grad, expected_x)
    assert_close(weights_R.grad, expected_weights)


def test_input_without_gradient() -> None:
    experts = make_experts()
    x_RD, weights_R = make_rows()
    experts(sorted_rows(x_RD.detach(), weights_R.detach(), COUNTS)).sum().backward()
    expected = torch.autograd.grad(plain_loop(experts, "silu", x_RD, weights_R, COUNTS).sum(), experts.w1)[0]
    assert_close(experts.w1.grad, expected)


def test_expanded_gradient_from_above() -> None:
    # .sum() hands a stride-0 gradient down
    experts = make_experts()
    x_RD, weights_R = make_rows()
    (grad,) = torch.autograd.grad(experts(sorted_rows(x_RD, weights_R, COUNTS)).sum(), x_RD)
    (expected,) = torch.autograd.grad(plain_loop(experts, "silu", x_RD, weights_R, COUNTS).sum(), x_RD)
    assert_close(grad, expected)


@pytest.mark.parametrize("is_gated", [True, False])
def test_bf16_is_close_to_float32(is_gated: bool) -> None:
    experts = make_experts(activation="gelu", is_gated=is_gated, has_bias=True, width=64, ffn_width=32).float()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.mul_(0.2)
    x_RD, weights_R = make_rows(width=64)
    results: dict[torch.dtype, list[Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        typed = experts.to(dtype)
        typed.zero_grad()
        x = x_RD.detach().to(dtype).requires_grad_()
        weights = weights_R.detach().float().requires_grad_()
        out_RD = typed(sorted_rows(x, weights, COUNTS))
        assert out_RD.dtype == dtype
        out_RD.sum().backward()
        assert weights.grad is not None
        assert weights.grad.dtype == torch.float32
        grads = [tensor.grad for tensor in (x, weights, *typed.parameters())]
        results[dtype] = [out_RD, *(grad.clone() for grad in grads if grad is not None)]
        assert len(results[dtype]) == 3 + len(list(typed.parameters()))
    for value, expected in zip(results[torch.bfloat16], results[torch.float32], strict=True):
        error = (value.float() - expected).norm() / expected.norm()
        assert error < 0.02  # bf16 has 8 bits: 2^-8 = .004 a rounding, of which each number passes a few


def test_under_autocast_it_runs_and_stays_close() -> None:
    experts = make_experts(has_bias=True).float()
    x_RD, weights_R = make_rows()
    rows = sorted_rows(x_RD.detach().float(), weights_R.detach().float(), COUNTS)
    expected_RD = experts(rows)
    with torch.autocast("cpu", torch.bfloat16):
        out_RD = experts(rows)
    assert (out_RD.float() - expected_RD).norm() / expected_RD.norm() < 0.03


def test_wrong_number_of_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="a plan for 3 experts; there are 4"):
        make_experts()(sorted_rows(*make_rows(), (3, 4, 1)))


def test_unknown_activation_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"'sillu' is not one of .*'silu'"):
        make_experts(activation="sillu")
