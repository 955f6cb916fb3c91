"""What holds for every router. A new router adds a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.routing.build import ROUTERS, build_router
from moe_lvlm.routing.router import Router
from moe_lvlm.routing.types import Modality, RoutingContext, RoutingDecision
from tests.routing.tables import ROWS

WIDTH, EXPERTS, TOP_K = 16, 6, 2

every_router = pytest.mark.parametrize(("settings", "num_slots"), ROWS, ids=lambda value: str(value))


def make(settings: dict[str, Any]) -> Router:
    """A router whose scores are far enough apart to be decided."""
    torch.manual_seed(0)
    config = MoEConfig.model_validate({"num_experts": EXPERTS, "top_k": TOP_K, "router": settings})
    router = build_router(model_width=WIDTH, config=config)
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    return router


def make_batch() -> tuple[Tensor, RoutingContext]:
    """Three rows of 9: an image and text; text; two images and text. Rows end in padding. Q is the instruction."""
    marks = ["VVVVQQL..", "QQLLL....", "VVVVQVVVV"]
    images = ["0000.....", ".........", "1111.2222"]
    kinds = {"V": Modality.VISION, "L": Modality.LANGUAGE, "Q": Modality.LANGUAGE, ".": Modality.PADDING}
    modality = torch.tensor([[int(kinds[mark]) for mark in row] for row in marks], dtype=torch.int8)
    image = torch.tensor([[-1 if mark == "." else int(mark) for mark in row] for row in images], dtype=torch.int32)
    sample = torch.where(modality == int(Modality.PADDING), -1, torch.arange(3)[:, None]).to(torch.int32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(27, WIDTH, generator=generator)
    return x, RoutingContext(
        modality_BS=modality,
        image_BS=image,
        sample_BS=sample,
        num_samples=3,
        instruction_BS=torch.tensor([[mark == "Q" for mark in row] for row in marks]),
        task_N=torch.tensor([1, -1, 0]),
        cluster_N=torch.tensor([4, 0, 2]),
        attention_BS=torch.rand(3, 9, generator=generator),
    )


def moved_context(
    context: RoutingContext, move: Callable[[Tensor, float], Tensor], move_N: Callable[[Tensor], Tensor]
) -> RoutingContext:
    """The context with every fact about tokens and about samples moved; 0 and -1 fill what is new."""
    assert context.instruction_BS is not None and context.attention_BS is not None
    assert context.task_N is not None and context.cluster_N is not None
    return replace(
        context,
        modality_BS=move(context.modality_BS, 0),
        image_BS=move(context.image_BS, -1),
        sample_BS=move(context.sample_BS, -1),
        instruction_BS=move(context.instruction_BS, False),
        attention_BS=move(context.attention_BS, 9.0),
        task_N=move_N(context.task_N),
        cluster_N=move_N(context.cluster_N),
    )


def decide(router: Router, x: Tensor, context: RoutingContext) -> RoutingDecision:
    """The decision with a row a token; the same noise, where there is any, every time."""
    torch.manual_seed(3)
    decision: RoutingDecision = router(x, context)
    return decision.by_token(context)


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
    router = make(settings).to(dtype).eval()
    assert router.num_slots == num_slots
    x, context = make_batch()
    decision = decide(router, x.to(dtype), context)
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
    assert not decision.keep_RK[~is_token].any()


@every_router
def test_scores_stay_float32_under_autocast(settings: dict[str, Any], num_slots: int) -> None:
    router = make(settings)
    x, context = make_batch()
    expected = decide(router, x, context).logits_RE
    with torch.autocast("cpu", torch.bfloat16):
        logits = decide(router, x, context).logits_RE
    torch.testing.assert_close(logits, expected)


@every_router
@pytest.mark.parametrize("is_training", [True, False])
def test_more_padding_and_another_order_change_nothing(
    settings: dict[str, Any], num_slots: int, is_training: bool
) -> None:
    if settings.get("second_choice_noise") == "gumbel" and is_training:
        pytest.skip("noise is drawn by position")
    router = make(settings).train(is_training)
    x, context = make_batch()
    plain = decide(router, x, context)
    # rows 2, 0, 1, with 4 columns of padding in front of them that hold large values; samples are counted by row
    order = [2, 0, 1]
    place = torch.arange(27).view(3, 9)[order].flatten()
    new_place = torch.arange(3 * 13).view(3, 13)[:, 4:].flatten()
    moved_x = torch.full((39, WIDTH), 50.0)
    moved_x[new_place] = x[place]

    def move(facts: Tensor, fill: float) -> Tensor:
        return torch.cat((torch.full((3, 4), fill, dtype=facts.dtype), facts[order]), dim=1)

    moved = moved_context(context, move, lambda facts: facts[order])
    moved = replace(moved, sample_BS=torch.where(moved.sample_BS >= 0, torch.arange(3)[:, None], -1).to(torch.int32))
    assert_same(rows_of(decide(router, moved_x, moved), new_place), rows_of(plain, place))


@every_router
def test_in_evaluation_a_sample_is_routed_as_if_it_were_alone(settings: dict[str, Any], num_slots: int) -> None:
    router = make(settings).eval()
    x, context = make_batch()
    together = decide(router, x, context)
    for row in range(3):
        places = torch.arange(row * 9, row * 9 + 9)

        def only(facts: Tensor, fill: float, row: int = row) -> Tensor:
            return facts[row : row + 1]

        alone = moved_context(context, only, lambda facts, row=row: facts[row : row + 1])  # type: ignore[misc]
        image = alone.image_BS
        first = image[image >= 0].min() if (image >= 0).any() else 0
        alone = replace(
            alone,
            num_samples=1,
            image_BS=torch.where(image >= 0, image - first, -1).to(torch.int32),
            sample_BS=torch.where(alone.sample_BS >= 0, 0, -1).to(torch.int32),
        )
        assert_same(rows_of(decide(router, x[places], alone), torch.arange(9)), rows_of(together, places))


@every_router
def test_the_task_reaches_every_parameter(settings: dict[str, Any], num_slots: int) -> None:
    router = make(settings)
    x, context = make_batch()
    decision = decide(router, x, context)
    (decision.weights_RK * torch.randn(decision.weights_RK.shape)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_router
@pytest.mark.parametrize("is_training", [True, False])
def test_a_batch_of_nothing_but_padding(settings: dict[str, Any], num_slots: int, is_training: bool) -> None:
    """What a rank gets whose records were all bad: it decides nothing, and its gradients are 0 rather than none."""
    router = make(settings).train(is_training)
    nothing = RoutingContext(
        modality_BS=torch.zeros(1, 1, dtype=torch.int8),
        image_BS=torch.full((1, 1), -1, dtype=torch.int32),
        sample_BS=torch.full((1, 1), -1, dtype=torch.int32),
        num_samples=0,
        instruction_BS=torch.zeros(1, 1, dtype=torch.bool),
        task_N=torch.zeros(0, dtype=torch.int64),
        cluster_N=torch.zeros(0, dtype=torch.int64),
        attention_BS=torch.zeros(1, 1),
    )
    decision = decide(router, torch.randn(1, WIDTH), nothing)
    assert not decision.keep_RK.any()
    decision.weights_RK.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for n, p in router.named_parameters() if "gate" in n)
