"""What holds for every router. A new router adds a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.build import ROUTERS, build_router
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision

WIDTH, EXPERTS, TOP_K = 16, 6, 2

# router settings -> slots a token
ROWS: list[tuple[dict[str, Any], int]] = [
    ({"kind": "top_k"}, 2),
    ({"kind": "ltdr"}, 6),
    ({"kind": "ltdr", "tail_k": 3, "tail_scope": "image"}, 3),
    ({"kind": "ltdr", "eea_select": "none"}, 2),
]
every_router = pytest.mark.parametrize(("settings", "num_slots"), ROWS, ids=lambda value: str(value))


def make(settings: dict[str, Any]) -> Router:
    torch.manual_seed(0)
    config = MoEConfig.model_validate({"num_experts": EXPERTS, "top_k": TOP_K, "router": settings})
    router = build_router(model_width=WIDTH, config=config)
    with torch.no_grad():
        router.gate.weight.mul_(20)
    return router


def make_batch() -> tuple[Tensor, RoutingContext]:
    """Three rows of 9: an image and text; text; two images and text. Rows end in padding."""
    marks = ["VVVVLLL..", "LLLLL....", "VVVVLVVVV"]
    images = ["0000.....", ".........", "1111.2222"]
    kinds = {"V": Modality.VISION, "L": Modality.LANGUAGE, ".": Modality.PADDING}
    modality = torch.tensor([[int(kinds[mark]) for mark in row] for row in marks], dtype=torch.int8)
    image = torch.tensor([[-1 if mark == "." else int(mark) for mark in row] for row in images], dtype=torch.int32)
    sample = torch.where(modality == int(Modality.PADDING), -1, torch.arange(3)[:, None]).to(torch.int32)
    x = torch.randn(27, WIDTH, generator=torch.Generator().manual_seed(1))
    return x, RoutingContext(modality_BS=modality, image_BS=image, sample_BS=sample)


def rows_of(decision: RoutingDecision, rows: Tensor) -> list[Tensor]:
    return [tensor[rows] for tensor in decision[:5]]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for value, expected in zip(left, right, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_every_kind_has_a_row() -> None:
    assert {settings["kind"] for settings, _ in ROWS} == set(ROUTERS)


@every_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(settings: dict[str, Any], num_slots: int, dtype: torch.dtype) -> None:
    router = make(settings).to(dtype)
    x, context = make_batch()
    decision = router(x.to(dtype), context)
    assert decision.logits_RE.shape == decision.probs_RE.shape == (27, EXPERTS)
    assert decision.expert_ids_RK.shape == decision.weights_RK.shape == decision.keep_RK.shape == (27, num_slots)
    assert {t.dtype for t in (decision.logits_RE, decision.probs_RE, decision.weights_RK)} == {torch.float32}
    assert decision.expert_ids_RK.dtype == torch.int64
    assert decision.keep_RK.dtype == torch.bool
    # an expert at most once a token, the best first, weights 0 where not kept and summing to 1 where kept
    assert all(len(set(row)) == num_slots for row in decision.expert_ids_RK.tolist())
    sorted_probs = decision.probs_RE.gather(1, decision.expert_ids_RK)
    assert (sorted_probs.diff(dim=-1) <= 0).all()
    assert (decision.weights_RK[~decision.keep_RK] == 0).all()
    is_token = context.modality_T != Modality.PADDING
    torch.testing.assert_close(decision.weights_RK.sum(dim=-1), is_token.float())


@every_router
def test_bf16_scores_are_computed_in_float32(settings: dict[str, Any], num_slots: int) -> None:
    router = make(settings).bfloat16()
    x, context = make_batch()
    expected = x.bfloat16().double() @ router.gate.weight.double().t()
    # products of bf16 numbers are exact in float32; in bf16 the error would be near 1e-2
    torch.testing.assert_close(router(x.bfloat16(), context).logits_RE.double(), expected, atol=1e-5, rtol=1e-5)


@every_router
def test_scores_stay_float32_under_autocast(settings: dict[str, Any], num_slots: int) -> None:
    router = make(settings)
    x, context = make_batch()
    expected = router(x, context).logits_RE
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x, context).logits_RE
    torch.testing.assert_close(logits, expected)


@every_router
@pytest.mark.parametrize("is_training", [True, False])
def test_more_padding_and_another_order_change_nothing(
    settings: dict[str, Any], num_slots: int, is_training: bool
) -> None:
    router = make(settings).train(is_training)
    x, context = make_batch()
    plain = router(x, context)
    # rows 2, 0, 1, with 4 columns of padding in front of them that hold large values
    order = [2, 0, 1]
    place = torch.arange(27).view(3, 9)[order].flatten()
    new_place = torch.arange(3 * 13).view(3, 13)[:, 4:].flatten()
    moved_x = torch.full((39, WIDTH), 50.0)
    moved_x[new_place] = x[place]

    def moved(facts: Tensor, fill: int) -> Tensor:
        return torch.cat((torch.full((3, 4), fill, dtype=facts.dtype), facts[order]), dim=1)

    moved_context = RoutingContext(
        modality_BS=moved(context.modality_BS, 0),
        image_BS=moved(context.image_BS, -1),
        sample_BS=moved(context.sample_BS, -1),
    )
    assert_same(rows_of(router(moved_x, moved_context), new_place), rows_of(plain, place))


@every_router
def test_in_evaluation_a_sample_is_routed_as_if_it_were_alone(settings: dict[str, Any], num_slots: int) -> None:
    router = make(settings).eval()
    x, context = make_batch()
    together = router(x, context)
    for row in range(3):
        places = torch.arange(row * 9, row * 9 + 9)
        image = context.image_BS[row : row + 1]
        alone = RoutingContext(
            modality_BS=context.modality_BS[row : row + 1],
            image_BS=torch.where(image >= 0, image - image[image >= 0].min() if (image >= 0).any() else image, -1),
            sample_BS=context.sample_BS[row : row + 1],
        )
        assert_same(list(router(x[places], alone)[:5]), rows_of(together, places))


@every_router
def test_the_task_reaches_the_gate(settings: dict[str, Any], num_slots: int) -> None:
    router = make(settings)
    x, context = make_batch()
    decision = router(x, context)
    (decision.weights_RK * torch.randn(decision.weights_RK.shape)).sum().backward()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.abs().sum() > 0
