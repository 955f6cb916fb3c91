"""Which vision tokens use more experts (LTDR table 7): head tokens, and those the instruction attends to; by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe_lvlm.moe.decoder import instruction_attention
from moe_lvlm.routing.ltdr import instruction_tokens
from moe_lvlm.routing.types import RoutingContext
from tests.routing.tables import TOKENS, VIS, context_of, hidden_of, identity_router, names_where, table_context

# attention that the instruction pays, in the order of the table: G A C E . B D F H .
ATTENTION = (0.9, 0.1, 0.3, 0.2, 9.0, 0.5, 0.5, 0.4, 0.8, 9.0)


def attended(attention: tuple[float, ...] = ATTENTION) -> RoutingContext:
    context = table_context()
    return replace(context, attention_BS=torch.tensor(attention).view(context.modality_BS.shape))


def selected_by(eea_select: str, context: RoutingContext, *, is_training: bool = True, share: float = 0.15) -> Tensor:
    """Bool [T]: tokens that use more than two experts."""
    router = identity_router(kind="ltdr", eea_select=eea_select, instruction_share=share).train(is_training)
    return router(hidden_of(*TOKENS), context).keep_RK.sum(dim=-1) > 2


def test_vision_head_is_what_the_tail_leaves() -> None:
    # in training the tail is BDF of all vision tokens; in evaluation A of image 0 and B of image 1 (test_ltdr)
    assert names_where(selected_by("vision_head", table_context())) == "ACE"
    assert names_where(selected_by("vision_head", table_context(), is_training=False)) == "CEDF"


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (0.15, "CB"),  # ceil(.15 x 3) = 1 an image; B and D are equal, B comes first
        (0.34, "CEBD"),  # ceil(1.02) = 2
        (2 / 3, "CEBD"),  # 2, not 3, though 3 x 2/3 may round above 2
        (1.0, "ACEBDF"),
    ],
)
def test_the_tokens_that_the_instruction_attends_to_most(share: float, names: str) -> None:
    assert names_where(instruction_tokens(attended(), share=share)) == names
    assert names_where(selected_by("instruction_aware", attended(), share=share)) == names


def test_a_share_that_rounds_up_takes_no_token_more() -> None:
    """.07 x 100 is 7.000000000000001."""
    context = context_of((VIS,) * 100, (0,) * 100, (0,) * 100, rows=1)
    context = replace(context, attention_BS=torch.arange(100.0)[None])
    assert instruction_tokens(context, share=0.07).nonzero().flatten().tolist() == list(range(93, 100))


def test_without_attention_it_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"model\.attention: eager"):
        selected_by("instruction_aware", table_context())


def test_attention_of_instruction_tokens_by_hand() -> None:
    """Two heads, one row: image tokens 0 and 1, instruction tokens 2 and 3, answer 4, padding 5."""
    attention = torch.zeros(1, 2, 6, 6)
    attention[0, 0, 2, :3] = torch.tensor([0.5, 0.3, 0.2])
    attention[0, 1, 2, :3] = torch.tensor([0.1, 0.1, 0.8])
    attention[0, 0, 3, :4] = torch.tensor([0.2, 0.4, 0.2, 0.2])
    attention[0, 1, 3, :4] = torch.tensor([0.0, 0.0, 0.5, 0.5])
    attention[0, :, 4, :5] = 0.2  # the answer asks nothing
    context = replace(
        context_of((2, 2, 1, 1, 1, 0), (0, 0, -1, -1, -1, -1), (0, 0, 0, 0, 0, -1), rows=1),
        instruction_BS=torch.tensor([[False, False, True, True, False, False]]),
    )
    found = instruction_attention(attention, context)
    # token 0: (.5 + .1) / 2 = .3 and (.2 + 0) / 2 = .1, their mean .2;  token 1: .2 and .2
    assert_close(found[0, :2], torch.tensor([0.2, 0.2]))
    # a cache in front: the last columns are this call's
    assert_close(instruction_attention(torch.nn.functional.pad(attention, (3, 0)), context), found)


def test_two_samples_in_one_row_have_means_of_their_own() -> None:
    """Packed: sample 0 is image token 0 and instruction 1; sample 1 is image token 2 and instructions 3 and 4."""
    attention = torch.zeros(1, 1, 5, 5)
    attention[0, 0, 1, :2] = torch.tensor([0.7, 0.3])
    attention[0, 0, 3, 2:4] = torch.tensor([0.6, 0.4])
    attention[0, 0, 4, 2:5] = torch.tensor([0.2, 0.4, 0.4])
    context = replace(
        context_of((2, 1, 2, 1, 1), (0, -1, 1, -1, -1), (0, 0, 1, 1, 1), rows=1),
        instruction_BS=torch.tensor([[False, True, False, True, True]]),
    )
    found = instruction_attention(attention, context)
    assert_close(found[0, [0, 2]], torch.tensor([0.7, 0.4]))
