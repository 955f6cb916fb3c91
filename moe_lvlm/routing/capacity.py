"""Expert capacity with position-based dropping, as DeepSpeed's top-2 gate does it (MoE-LLaVA's setting).

T tokens   K slots a token   E experts
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_capacity(num_positions: int, num_experts: int, *, top_k: int, factor: float) -> int:
    """Rows that one expert takes of a micro-batch: ceil(k x factor x T / E). T counts padding, as DeepSpeed does."""
    # 1.1 x 100 is a little more than 110 in floating point
    return math.ceil(top_k * factor * num_positions / num_experts - 1e-9)


def drop_over_capacity(expert_ids_TK: Tensor, chosen_TK: Tensor, *, num_experts: int, capacity: int) -> Tensor:
    """Bool [T, K]: the chosen slots that find room.

    Slots queue at their expert: all first choices by position, then all second choices, and so on; each expert takes
    the first `capacity` of its queue.
    """
    # Slot by slot, within a slot by position
    expert_A = expert_ids_TK.t().flatten()
    chosen_A = chosen_TK.t().flatten()
    queue_AE = torch.nn.functional.one_hot(expert_A, num_experts) * chosen_A[:, None]
    place_A = queue_AE.cumsum(dim=0).gather(1, expert_A[:, None]).squeeze(1)
    return (chosen_A & (place_A <= capacity)).view(chosen_TK.shape[1], -1).t()
