"""Each router's equation, beside loops and by hand; types; where it starts."""

from __future__ import annotations

import math

import pytest
import torch

from moe_lvlm.connectors.routers import ROUTERS, ConnectorRouter
from tests.connectors.slow_qmoe import ROUTERS as NAMES
from tests.connectors.slow_qmoe import slow_scores

every_router = pytest.mark.parametrize("name", NAMES)


def make_router(name: str, width: int, num_experts: int, dtype: torch.dtype = torch.float64) -> ConnectorRouter:
    router = ROUTERS[name](width, num_experts).to(dtype)
    with torch.no_grad():
        router.weight.normal_()
    return router


@every_router
@pytest.mark.parametrize("seed", range(5))
def test_equals_loops(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    rows, num_experts, queries, width = (int(torch.randint(1, high, ())) for high in (5, 5, 6, 9))
    router = make_router(name, width, num_experts)
    x, out, cls = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((rows, queries, width), (rows, num_experts, queries, width), (rows, width))
    )
    expected = torch.stack(
        [torch.stack(slow_scores(name, x[r], list(out[r]), cls[r], router.weight)) for r in range(rows)]
    )
    torch.testing.assert_close(router(x, out, cls), expected)


def test_cross_by_hand() -> None:
    """D = 4, so sqrt(D) = 2; two queries with similarities 2 ln 3 and 0 have attention 3/4 and 1/4."""
    router = make_router("cross", 4, 1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 10, 100, 0]]))
    cls = torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)
    out = torch.tensor([[[[1, 2, 3, 2 * math.log(3)], [5.0, 6, 7, 0]]]], dtype=torch.float64)
    # c = 3/4 (1, 2, 3) + 1/4 (5, 6, 7) = (2, 3, 4)
    torch.testing.assert_close(
        router(torch.zeros(1, 2, 4, dtype=torch.float64), out, cls), torch.tensor([[432.0]], dtype=torch.float64)
    )


@every_router
def test_scores_are_float32_under_bf16(name: str) -> None:
    """The same as float32 arithmetic on the rounded numbers, under autocast too, and gradients keep their types."""
    torch.manual_seed(0)
    x, out, cls = torch.randn(3, 4, 8).bfloat16(), torch.randn(3, 2, 4, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    router = make_router(name, 8, 2, torch.bfloat16)
    wide = make_router(name, 8, 2, torch.float32)
    with torch.no_grad():
        wide.weight.copy_(router.weight)
    out.requires_grad_()
    scores = router(x, out, cls)
    assert scores.dtype == torch.float32
    expected = wide(x.float(), out.float(), cls.float())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wide(x, out, cls), expected, rtol=0, atol=1e-5)
    scores.sum().backward()
    assert router.weight.grad is not None and router.weight.grad.dtype == torch.bfloat16


@every_router
def test_starts_small(name: str) -> None:
    torch.manual_seed(0)
    router = ROUTERS[name](2000, 5)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.1)
    before = router.weight.clone()
    router.reset_parameters()
    assert not torch.equal(before, router.weight)
    assert router.weight.shape == ((1 if name in ("cross", "post") else 5), 2000)
