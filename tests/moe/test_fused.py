"""The CUDA path of the experts: its kernels by Triton's interpreter (on a GPU as they are), its products on the CPU.

Everything is held to the plain path, which has tests of its own against a loop over rows.
"""

from __future__ import annotations

import itertools
import os
import random
import warnings

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.moe import kernels
from moe_lvlm.moe.experts import Experts, RoutedFFN
from moe_lvlm.moe.fused import FusedFFN, can_compute
from moe_lvlm.moe.layer import MoELayer
from moe_lvlm.moe.products import Products, choose_products
from moe_lvlm.moe.rows import RowPlan, plan_rows, sum_rows, take_rows
from moe_lvlm.moe.types import ExpertRows
from moe_lvlm.routing.build import build_router
from moe_lvlm.routing.types import RoutingContext, RoutingDecision, Site
from tests.moe.tables import decision_of

WIDTH, FFN_WIDTH = 16, 40
# DS_ACCELERATOR=cuda runs this file on a GPU.
DEVICE = torch.device("cpu" if os.environ["DS_ACCELERATOR"] == "cpu" else "cuda")
WAYS = {"loop": (False, False), "loop, grouped sums": (False, True), "grouped": (True, True)}


def draw_choices(num_tokens: int, num_experts: int, *, fixed: int | None = None, seed: int = 0) -> list[list[int]]:
    """Distinct experts of each token, from none to all of them, or `fixed`."""
    draw = random.Random(seed)
    sizes = [draw.randint(0, num_experts) if fixed is None else fixed for _ in range(num_tokens)]
    return [draw.sample(range(num_experts), size) for size in sizes]


# case -> the experts of each token, how many experts there are
CASES: dict[str, tuple[list[list[int]], int]] = {
    "variable": (draw_choices(37, 4), 4),
    "top-2 and padding": (draw_choices(20, 5, fixed=2) + [[]] * 4, 5),
    "one expert takes all": ([[2]] * 23, 4),
    "70 % on one": ([[0, 1 + token % 3] if token % 10 < 7 else [1, 2] for token in range(30)], 4),
    "two experts of 16": (draw_choices(9, 2, fixed=2), 16),
    "one token": ([[1, 0]], 3),
    "nothing kept": ([[]] * 5, 4),
}


def uncounted(plan: RowPlan) -> RowPlan:
    """As it comes from the kernels: places for all slots, those after the last row undefined."""
    unknown = plan.slot_R.new_zeros(plan.row_NK.numel() - len(plan.slot_R))
    return plan._replace(slot_R=torch.cat((plan.slot_R, unknown)), counts=None)


def on_device(plan: RowPlan) -> RowPlan:
    return RowPlan(*(tensor.to(DEVICE) for tensor in plan[:3]), plan.counts)


def make_experts(num_experts: int, *, activation: str = "silu", is_gated: bool = True, width: int = WIDTH) -> Experts:
    experts = Experts(
        num_experts=num_experts,
        model_width=width,
        ffn_width=FFN_WIDTH,
        activation=activation,
        is_gated=is_gated,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return experts.to(DEVICE)


def run_plain(rows: ExpertRows, experts: Experts) -> Tensor:
    """Expert by expert, which has no kernel of ours in it on any device."""
    stacks = (experts.w1, experts.w2, experts.w3, None, None, None)
    out_ND: Tensor = RoutedFFN.apply(rows.x_ND, rows.weights_NK, rows.plan.counted(), experts.act, *stacks)
    return out_ND


def run_fused(rows: ExpertRows, experts: Experts, way: str) -> Tensor:
    """By one of the ways to make products; torch's grouped one runs on the CPU too."""
    is_grouped, is_outer_grouped = WAYS[way]
    plan = uncounted(rows.plan) if is_grouped else rows.plan
    kind = kernels.ACTIVATIONS[experts.activation]
    products = Products(plan, is_grouped, is_outer_grouped)
    out_ND: Tensor = FusedFFN.apply(rows.x_ND, rows.weights_NK, products, kind, experts.w1, experts.w2, experts.w3)
    return out_ND


def rows_of(decision: RoutingDecision, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> ExpertRows:
    x_ND = torch.randn(len(decision.keep_RK), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights_NK = decision.weights_RK.to(DEVICE).requires_grad_()
    return ExpertRows(x_ND.to(DEVICE).requires_grad_(), on_device(plan_rows(decision)), weights_NK)


def outcome(out_ND: Tensor, rows: ExpertRows, experts: Experts) -> dict[str, Tensor]:
    """Output, and gradients of a loss that weighs every number differently."""
    upstream = torch.arange(1.0, out_ND.numel() + 1, device=DEVICE).view_as(out_ND).cos().to(out_ND.dtype)
    inputs = {"x": rows.x_ND, "weights": rows.weights_NK, **dict(experts.named_parameters())}
    grads = torch.autograd.grad(out_ND, list(inputs.values()), upstream)
    return {"out": out_ND.detach(), **dict(zip(inputs, grads, strict=True))}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_that_of_the_plain_path(case: str) -> None:
    choices, num_experts = CASES[case]
    decision = decision_of(choices, num_experts, num_slots=max(2, *map(len, choices)))
    plan = plan_rows(decision)
    slot_R, row_NK, stop_E = kernels.plan(decision.expert_ids_RK.to(DEVICE), decision.keep_RK.to(DEVICE), num_experts)
    assert row_NK.tolist() == plan.row_NK.tolist()
    assert stop_E.tolist() == plan.stop_E.tolist()
    assert slot_R[: len(plan.slot_R)].tolist() == plan.slot_R.tolist()


@pytest.mark.parametrize("num_experts", [3, 64, 200])
def test_plans_of_several_blocks(num_experts: int) -> None:
    choices = draw_choices(700, num_experts, fixed=3, seed=num_experts)
    choices[100:110] = [[]] * 10
    decision = decision_of(choices, num_experts)
    plan = plan_rows(decision)
    slot_R, row_NK, stop_E = kernels.plan(decision.expert_ids_RK.to(DEVICE), decision.keep_RK.to(DEVICE), num_experts)
    assert torch.equal(row_NK.cpu(), plan.row_NK) and torch.equal(stop_E.cpu(), plan.stop_E)
    assert torch.equal(slot_R[: len(plan.slot_R)].cpu(), plan.slot_R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_and_come_as_on_the_plain_path(dtype: torch.dtype) -> None:
    plan = plan_rows(decision_of(CASES["variable"][0], 4, num_slots=4))
    x_ND = torch.randn(37, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected_ND = sum_rows(take_rows(x_ND, plan), plan, dtype)
    there = on_device(plan)
    taken_RD = kernels.gather_rows(x_ND.to(DEVICE), *uncounted(there)[:3])
    assert torch.equal(taken_RD[: len(plan.slot_R)].cpu(), take_rows(x_ND, plan))
    assert_close(kernels.sum_rows(taken_RD, there.row_NK, dtype).cpu(), expected_ND)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_plain_path(case: str, way: str) -> None:
    choices, num_experts = CASES[case]
    experts = make_experts(num_experts)
    rows = rows_of(decision_of(choices, num_experts, num_slots=max(2, *map(len, choices))))
    expected = outcome(run_plain(rows, experts), rows, experts)
    for name, value in outcome(run_fused(rows, experts, way), rows, experts).items():
        assert_close(value, expected[name], atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("activation", "is_gated"),
    list(itertools.product(("silu", "gelu", "gelu_new", "gelu_pytorch_tanh"), (True, False))),
)
def test_every_activation(activation: str, is_gated: bool) -> None:
    experts = make_experts(4, activation=activation, is_gated=is_gated)
    rows = rows_of(decision_of(CASES["variable"][0], 4, num_slots=4))
    expected = outcome(run_plain(rows, experts), rows, experts)
    for name, value in outcome(run_fused(rows, experts, "loop"), rows, experts).items():
        assert_close(value, expected[name], atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_as_close_to_float32_as_the_plain_path(way: str) -> None:
    decision = decision_of(CASES["variable"][0], 4, num_slots=4)
    experts, rows = make_experts(4), rows_of(decision)
    expected = outcome(run_plain(rows, experts), rows, experts)
    half = make_experts(4).bfloat16()
    half_rows = rows_of(decision, torch.bfloat16)
    plain = outcome(run_plain(half_rows, half), half_rows, half)
    for name, value in outcome(run_fused(half_rows, half, way), half_rows, half).items():
        error = (value.float() - expected[name]).norm() / expected[name].norm()
        allowed = (plain[name].float() - expected[name]).norm() / expected[name].norm()
        assert error < 1.5 * allowed + 2**-9, name


def test_random_shapes() -> None:
    draw = random.Random(7)
    for seed in range(6):
        num_experts, width = draw.choice((1, 2, 5, 8)), 8 * draw.randint(1, 6)
        choices = draw_choices(draw.randint(1, 40), num_experts, seed=seed)
        experts = make_experts(num_experts, width=width)
        rows = rows_of(decision_of(choices, num_experts, num_slots=num_experts), width=width)
        expected = outcome(run_plain(rows, experts), rows, experts)
        for way in WAYS:
            for name, value in outcome(run_fused(rows, experts, way), rows, experts).items():
                assert_close(value, expected[name], atol=2e-5, rtol=1e-4)


def test_frozen_parameters_get_no_gradient() -> None:
    experts, rows = make_experts(4), rows_of(decision_of(CASES["variable"][0], 4, num_slots=4))
    experts.w1.requires_grad_(False)
    run_fused(rows, experts, "loop").sum().backward()
    assert experts.w1.grad is None and experts.w2.grad is not None
    assert experts.w3 is not None and experts.w3.grad is not None


def test_what_it_can_compute() -> None:
    assert can_compute("silu", torch.bfloat16) and can_compute("gelu", torch.float32)
    assert not can_compute("relu", torch.float32) and not can_compute("silu", torch.float64)


def test_without_a_grouped_kernel_the_host_counts() -> None:
    plan = on_device(plan_rows(decision_of(CASES["variable"][0], 4, num_slots=4)))
    products = choose_products(uncounted(plan), torch.zeros(4, 8, 8, device=DEVICE))  # there is none for float32
    assert not products.is_grouped and not products.is_outer_grouped
    assert products.plan.counts == plan.counts


@pytest.mark.skipif(DEVICE.type == "cpu", reason="on a GPU: the layer as it is called")
@pytest.mark.parametrize("kind", ["top_k", "ltdr"])
def test_the_layer_on_a_gpu_looks_at_the_device_as_often_as_it_says(kind: str) -> None:
    config = MoEConfig.model_validate({"num_experts": 4, "top_k": 2, "router": {"kind": kind}})
    torch.manual_seed(0)
    router, experts = build_router(model_width=64, config=config), make_experts(4, width=64)
    layer = MoELayer(router=router, experts=experts, site=Site("language_model", 0)).to(DEVICE, torch.bfloat16)
    x_BSD = torch.randn(2, 96, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    context = RoutingContext.all_language((2, 96), DEVICE)
    layer(x_BSD, context).sum().backward()  # compiles the kernels
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        layer(x_BSD, context).sum().backward()
        torch.cuda.set_sync_debug_mode("default")
    looks = [one for one in caught if "called a synchronizing CUDA operation" in str(one.message)]
    assert len(looks) == (0 if kind == "top_k" else 1), [str(one.message) for one in looks]
