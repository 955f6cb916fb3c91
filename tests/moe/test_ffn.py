"""Cutting a dense FFN into experts, for each layout: the slices together are the dense FFN."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from moe_lvlm.moe.experts import Experts
from moe_lvlm.moe.ffn import FUSED_GATED, GATED, TWO_LAYER, FFNLayout, copy_dense_into, cut_experts, ffn_shape
from tests.moe.tables import sorted_rows
from tests.tiny_models import HIDDEN, shake, tiny_text_config

FFN_WIDTH = 48

# name -> (a dense FFN of transformers, its layout)
DENSE: dict[str, tuple[nn.Module, FFNLayout]] = {
    "gated": (LlamaMLP(tiny_text_config("llama")), GATED),
    "gated with biases": (LlamaMLP(tiny_text_config("llama", mlp_bias=True)), GATED),
    "fused gate": (Phi3MLP(tiny_text_config("phi3")), FUSED_GATED),
    "two layers with biases": (PhiMLP(tiny_text_config("phi")), TWO_LAYER),
}
every_layout = pytest.mark.parametrize("kind", list(DENSE))


def dense_ffn(kind: str) -> tuple[nn.Module, FFNLayout]:
    ffn, layout = DENSE[kind]
    ffn = copy.deepcopy(ffn)
    shake(ffn, scale=0.5, seed=0)
    return ffn, layout


def cut(kind: str, *, num_experts: int, fine_grained: int) -> tuple[nn.Module, Experts]:
    ffn, layout = dense_ffn(kind)
    width, ffn_width, has_bias = ffn_shape(ffn, layout)
    assert (width, ffn_width) == (HIDDEN, FFN_WIDTH)
    experts = Experts(
        num_experts=num_experts,
        model_width=width,
        ffn_width=ffn_width // fine_grained,
        activation="gelu_new" if kind.startswith("two") else "silu",
        is_gated=layout.is_gated,
        has_bias=has_bias,
    )
    copy_dense_into(experts, ffn, layout, fine_grained=fine_grained)
    return ffn, experts


def outputs_of_each(experts: Experts, x_TD: Tensor) -> list[Tensor]:
    """Every expert's output [T, D] for the same tokens with weight 1."""
    count = experts.w1.shape[0]
    rows = sorted_rows(x_TD.repeat(count, 1), torch.ones(count * len(x_TD)), (len(x_TD),) * count)
    return list(experts(rows).chunk(count))


def some_tokens() -> Tensor:
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))


@every_layout
def test_full_width_experts_are_copies(kind: str) -> None:
    ffn, experts = cut(kind, num_experts=3, fine_grained=1)
    x_TD = some_tokens()
    for out_TD in outputs_of_each(experts, x_TD):
        assert_close(out_TD, ffn(x_TD), atol=1e-4, rtol=1e-5)


@every_layout
@pytest.mark.parametrize("fine_grained", [2, 3, 4])
def test_all_slices_with_weight_one_are_the_dense_ffn(kind: str, fine_grained: int) -> None:
    # two sets of slices; biases of the second layer must be counted once in each
    ffn, experts = cut(kind, num_experts=2 * fine_grained, fine_grained=fine_grained)
    x_TD = some_tokens()
    outputs = outputs_of_each(experts, x_TD)
    for first in (0, fine_grained):
        summed_TD = torch.stack(outputs[first : first + fine_grained]).sum(dim=0)
        assert_close(summed_TD, ffn(x_TD), atol=1e-4, rtol=1e-5)
    if fine_grained > 1:
        assert (outputs[0] - outputs[1]).abs().max() > 0.1  # they are slices, not copies


@every_layout
def test_a_range_of_experts_is_that_part_of_all(kind: str) -> None:
    ffn, experts = cut(kind, num_experts=8, fine_grained=4)
    for name, parameter in experts.named_parameters():
        part = cut_experts(name, ffn.get_parameter, DENSE[kind][1], start=3, stop=6, fine_grained=4)
        assert torch.equal(part, parameter[3:6])


def test_matrix_that_a_layout_does_not_have() -> None:
    ffn, layout = dense_ffn("two layers with biases")
    with pytest.raises(ValueError, match="an FFN that is not gated has no w3"):
        cut_experts("w3", ffn.get_parameter, layout, start=0, stop=1, fine_grained=1)
