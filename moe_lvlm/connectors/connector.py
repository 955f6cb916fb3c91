"""From an image's features to visual tokens, by way of a Q-Former that reads the instruction.

I images   N image features   C their width   Q queries   W words   D width of the Q-Former   L width of the language model
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerModel

from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.routing.trace import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorInputs:
    """What a Q-Former is told of each image besides its features.

    input_ids, attention_mask: [I, W], the instruction's words in the Q-Former's tokens.
    draw_I: int64, what an image's noise is drawn from (Q-MoE, in training). is_counted_I: bool, False for an image that
    stands for none; None counts all. trace: where Q-MoE's decisions go.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    draw_I: Tensor | None = None
    is_counted_I: Tensor | None = None
    trace: RoutingTrace | None = None


def query(
    qformer: InstructBlipQFormerModel, query_tokens_1QD: Tensor, features_INC: Tensor, inputs: ConnectorInputs
) -> Tensor:
    """What the queries have found in each image, [I, Q, D].

    Raises:
        ValueError: words for another number of images than there are.
    """
    num_images, num_queries = features_INC.shape[0], query_tokens_1QD.shape[1]
    if inputs.input_ids.shape[0] != num_images:
        raise ValueError(
            f"qformer_input_ids has {inputs.input_ids.shape[0]} rows for {num_images} images; allowed: one row an image"
        )
    words = torch.ones_like(inputs.input_ids) if inputs.attention_mask is None else inputs.attention_mask
    queries = words.new_ones(num_images, num_queries)
    further = {}
    if isinstance(qformer, QMoEModel):
        further = {"draw_ids": inputs.draw_I, "is_counted": inputs.is_counted_I, "trace": inputs.trace}
    output = qformer(
        input_ids=inputs.input_ids,
        attention_mask=torch.cat((queries, words), dim=1),
        query_embeds=query_tokens_1QD.expand(num_images, -1, -1),
        encoder_hidden_states=features_INC,
        **further,
    )
    return output.last_hidden_state[:, :num_queries]


class QFormerConnector(nn.Module):
    """Queries, Q-Former and the projection into a language model, under InstructBLIP's names."""

    def __init__(self, qformer: InstructBlipQFormerModel, *, num_queries: int, language_width: int) -> None:
        super().__init__()
        width = qformer.config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, width))
        self.qformer = qformer
        self.language_projection = nn.Linear(width, language_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries from torch's generator: they differ in nothing else. (transformers starts them at 0, which
        serves where a checkpoint follows.)"""
        nn.init.normal_(self.query_tokens, std=self.qformer.config.initializer_range)

    def forward(self, features_INC: Tensor, inputs: ConnectorInputs) -> Tensor:
        """[I, N, C] -> [I, Q, L]."""
        return self.language_projection(query(self.qformer, self.query_tokens, features_INC, inputs))
