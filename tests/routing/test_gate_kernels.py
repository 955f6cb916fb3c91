"""The gate's kernels (by Triton's interpreter off a GPU) against float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe_lvlm.routing import gate_kernels

# DS_ACCELERATOR=cuda runs this file on a GPU.
DEVICE = torch.device("cpu" if os.environ["DS_ACCELERATOR"] == "cpu" else "cuda")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width", "experts"), [(1, 8, 2), (70, 24, 4), (130, 300, 17), (64, 128, 64)])
def test_scores_and_gradients_are_float32(tokens: int, width: int, experts: int, dtype: torch.dtype) -> None:
    x_TD, weight_ED = draw(tokens, width, seed=0, dtype=dtype), draw(experts, width, seed=1, dtype=dtype)
    grad_TE = draw(tokens, experts, seed=2)
    scores_TE = gate_kernels.score(x_TD, weight_ED)
    assert scores_TE.dtype == torch.float32
    assert_close(scores_TE.double(), x_TD.double() @ weight_ED.double().t(), atol=1e-4, rtol=1e-5)

    grad_x_TD, grad_weight_ED = gate_kernels.score_backward(grad_TE, x_TD, weight_ED)
    assert grad_x_TD.dtype == dtype and grad_weight_ED.dtype == dtype
    # the sums are float32's, rounded once
    assert_close(grad_x_TD, (grad_TE.double() @ weight_ED.double()).to(dtype))
    assert_close(grad_weight_ED, (grad_TE.double().t() @ x_TD.double()).to(dtype))


def test_what_they_are_for() -> None:
    half, full = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 8)
    assert gate_kernels.can_score(half, half)
    assert not gate_kernels.can_score(full, full)
    assert not gate_kernels.can_score(half, full)
    assert not gate_kernels.can_score(half[:0], half)
