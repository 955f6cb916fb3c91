"""The loss of the next token, and what is added to it.

B batch   S sequence   V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss


def language_loss(
    logits_BSV: Tensor, labels_BS: Tensor, *, vocab_size: int, num_items_in_batch: Tensor | None
) -> Tensor:
    """Cross entropy of the next token over the supervised positions; 0 where there is none, never NaN.

    labels_BS: not shifted, -100 where there is no loss. num_items_in_batch: divisor of the summed losses; None means
    the supervised tokens of this call.
    """
    if num_items_in_batch is None:
        num_items_in_batch = (labels_BS[:, 1:] != -100).sum().clamp_min(1)
    return ForCausalLMLoss(logits_BSV, labels_BS, vocab_size, num_items_in_batch=num_items_in_batch)


class Losses(NamedTuple):
    """total: language plus balance. balance: auxiliary losses of routers. None where there is none."""

    total: Tensor | None = None
    language: Tensor | None = None
    balance: Tensor | None = None


def sum_losses(language: Tensor, balance: Tensor | None) -> Losses:
    """Both, and what they come to."""
    return Losses(language if balance is None else language + balance, language, balance)
