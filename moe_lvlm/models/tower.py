"""The vision tower by itself: the features that a connector reads of images.

I images   C channels   H, W height, width   M features of an image   D their width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def tower_features(
    tower: nn.Module, pixel_values: Tensor, *, layer: int | list[int] | None, select: str | None
) -> Tensor:
    """What a connector reads of images [I, C, H, W]: [I, M, D].

    layer: the hidden state, or the hidden states, side by side; None takes the tower's output, after its last norm
    (InstructBLIP). select: `default` leaves the first token out, `full` and None keep all.
    """
    if layer is None:
        output: Tensor = tower(pixel_values=pixel_values, return_dict=True).last_hidden_state
        return output
    layers = [layer] if isinstance(layer, int) else layer
    hidden_states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    chosen = [hidden_states[one] for one in layers]
    if select == "default":
        chosen = [features_IMD[:, 1:] for features_IMD in chosen]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)


def is_frozen(tower: nn.Module) -> bool:
    """Whether nothing of it is trained."""
    return not any(parameter.requires_grad for parameter in tower.parameters())
