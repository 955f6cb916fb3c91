"""What both hosts of a Q-Former connector share: its words, its draws, its loss.

B batch   S sequence   N samples   I images   W words
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import InstructBlipQFormerModel

from moe_lvlm.connectors.connector import ConnectorInputs
from moe_lvlm.connectors.importance import importance_loss
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import CONNECTOR, RoutingContext

# An odd number: an image's place among those of its sample never makes two draws one.
_IMAGE_STRIDE = 0x9E3779B97F4A7C1


def connector_inputs(
    input_ids_IW: Tensor | None,
    attention_mask_IW: Tensor | None,
    *,
    num_images: int,
    trace: RoutingTrace | None,
) -> ConnectorInputs:
    """The words of each image, and where a decision about it goes.

    Raises:
        ValueError: there are images but no words.
    """
    if input_ids_IW is None:
        raise ValueError(
            f"{num_images} images, but no qformer_input_ids: this model's connector is a Q-Former, which reads the "
            "instruction; give its tokens, a row an image (InstructBlipProcessor makes them)"
        )
    context = None if trace is None else trace.context
    return ConnectorInputs(
        input_ids=input_ids_IW,
        attention_mask=attention_mask_IW,
        draw_I=None if context is None else image_draws(context, num_images),
        trace=trace,
    )


def blank_inputs(trace: RoutingTrace | None, device: torch.device) -> ConnectorInputs:
    """One word for the image that stands for none, and counts nowhere."""
    return ConnectorInputs(
        input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
        draw_I=torch.zeros(1, dtype=torch.int64, device=device),
        is_counted_I=torch.zeros(1, dtype=torch.bool, device=device),
        trace=trace,
    )


def image_draws(context: RoutingContext, num_images: int) -> Tensor | None:
    """Int64 [I]: the draw of each image's sample, another one for each image of a sample; None where draws are not known."""
    if context.draw_N is None:
        return None
    image_T, sample_T = context.image_T.long(), context.sample_T.long()
    is_visual_T = image_T >= 0
    sample_I = sample_T.new_zeros(num_images).index_copy(0, image_T[is_visual_T], sample_T[is_visual_T])
    is_same_II = sample_I[:, None] == sample_I[None, :]
    place_I = is_same_II.tril(diagonal=-1).sum(dim=1)
    return context.draw_N[sample_I] + place_I * _IMAGE_STRIDE


def connector_loss(trace: RoutingTrace | None, qformer: InstructBlipQFormerModel) -> Tensor | None:
    """The importance loss of a Q-MoE times its coefficient (Q-MoE eq. 7); None for a plain Q-Former, and outside
    training for a batch without an image."""
    decisions = [] if trace is None else [decision for _, decision in trace.of(CONNECTOR)]
    if not isinstance(qformer, QMoEModel) or not decisions:
        return None
    return qformer.settings.importance_coefficient * importance_loss(decisions, qformer.sum_over_ranks)
