"""Sizes at full scale, beside the paper's table 5."""

from __future__ import annotations

import pytest
from transformers import InstructBlipQFormerConfig

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.parameters import connector_parameters

VICUNA_7B_WIDTH = 4096


@pytest.mark.parametrize(
    ("num_experts", "has_general", "paper", "millions"),
    [
        (1, False, 188, 188.83),
        (3, False, 245, 245.52),
        (2, True, 245, 245.52),
        (4, False, 273, 273.87),
        (3, True, 273, 273.87),
        (7, True, 387, 387.24),
    ],
)
def test_table_5(num_experts: int, has_general: bool, paper: int, millions: float) -> None:
    """The paper cuts the millions off; two decimals are the SPEC's. The configuration is transformers' default, that of
    InstructBLIP's Q-Former; the router has no part."""
    settings = ExpertSettings(num_experts=num_experts, has_general_expert=has_general)
    count = connector_parameters(InstructBlipQFormerConfig(), settings, num_queries=32, language_width=VICUNA_7B_WIDTH)
    assert count // 1_000_000 == paper
    assert round(count / 1e6, 2) == millions


def test_a_plain_q_former_is_the_row_of_one_expert() -> None:
    """By hand, all of BERT-base's parts: an attention block is 4 (or with the image's width 2 + 2) matrices and a norm,
    an FFN two matrices and a norm."""
    width, inner, image, words, positions = 768, 3072, 1408, 30522, 512
    attention = 4 * (width + 1) * width + 2 * width
    crossing = 2 * (width + 1) * width + 2 * (image + 1) * width + 2 * width
    ffn = (width + 1) * inner + (inner + 1) * width + 2 * width
    embeddings = (words + positions) * width + 2 * width
    by_hand = embeddings + 12 * (attention + 2 * ffn) + 6 * crossing + 32 * width + (width + 1) * VICUNA_7B_WIDTH
    found = connector_parameters(InstructBlipQFormerConfig(), None, num_queries=32, language_width=VICUNA_7B_WIDTH)
    assert found == by_hand
    one = ExpertSettings(num_experts=1, has_general_expert=False)
    assert found == connector_parameters(
        InstructBlipQFormerConfig(), one, num_queries=32, language_width=VICUNA_7B_WIDTH
    )
