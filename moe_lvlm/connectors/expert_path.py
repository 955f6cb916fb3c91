"""ExpertPath: a beam search over the layers for the experts that a sample passes (Q-MoE algorithm 1).

N samples   P paths of a sample before a layer   E experts   K paths kept after it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """What a layer keeps, best first.

    path_NK: int64, the path (index in the layer's beam before it) that goes on. expert_NK: int64, the expert by which.
    score_NK: float64, detached, sum of log g along the path.
    """

    path_NK: Tensor
    expert_NK: Tensor
    score_NK: Tensor


class PathStep(NamedTuple):
    """Where the final path passes a layer.

    path_N: int64, its index in the beam before the layer. kept_N: int64, after it. expert_N: int64, its expert there.
    """

    path_N: Tensor
    kept_N: Tensor
    expert_N: Tensor


def beam_widths(num_layers: int, num_experts: int, *, num_paths: int, selection: str) -> tuple[int, ...]:
    """Paths of a sample that each layer keeps, bottom layer first.

    The first layer keeps all its experts, also if they are more than `num_paths` (algorithm 1, lines 3 to 6), a later
    one the best `num_paths`, and the top layer one. Under `greedy` every layer keeps one.
    """
    widths: list[int] = []
    for layer in range(num_layers):
        if selection == "greedy" or layer == num_layers - 1:
            widths.append(1)
        else:
            widths.append(min(num_paths, widths[-1] * num_experts) if widths else num_experts)
    return tuple(widths)


def select_paths(score_NP: Tensor, log_gate_NPE: Tensor, *, num_kept: int) -> Selection:
    """The best of a layer's P x E candidates.

    score_NP: float64, of the paths so far, best first. log_gate_NPE: log g of each expert on each path. Both are read
    without their gradients: scores only rank. Of equal candidates the one of the better path comes first, on one path
    the one of the lowest expert.

    Sums are float64: six float32 numbers add up to the same in any order, but for the rarest, so a tie of two paths is
    one by what they pass and not by its order, and one path's experts never tie for want of digits.
    """
    num_paths, num_experts = log_gate_NPE.shape[1:]
    assert 1 <= num_kept <= num_paths * num_experts
    score_NA = (score_NP.detach()[:, :, None] + log_gate_NPE.detach().double()).flatten(1)
    # A stable sort, not topk: equal scores go to the lowest index on every device.
    sorted_NA, order_NA = score_NA.sort(dim=1, descending=True, stable=True)
    kept_NK = order_NA[:, :num_kept]
    return Selection(
        path_NK=kept_NK.div(num_experts, rounding_mode="floor"),
        expert_NK=kept_NK % num_experts,
        score_NK=sorted_NA[:, :num_kept],
    )


def trace_back(selections: Sequence[Selection]) -> list[PathStep]:
    """The way of the top layer's best path through the layers, bottom layer first.

    selections: of each layer from the first with experts to the top.
    """
    kept_N = torch.zeros_like(selections[-1].path_NK[:, 0])
    steps: list[PathStep] = []
    for selection in reversed(selections):
        path_N = selection.path_NK.gather(1, kept_N[:, None]).squeeze(1)
        expert_N = selection.expert_NK.gather(1, kept_N[:, None]).squeeze(1)
        steps.append(PathStep(path_N, kept_N, expert_N))
        kept_N = path_N
    return steps[::-1]
