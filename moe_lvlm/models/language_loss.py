"""The loss of the next token.

B batch   S sequence   V vocabulary
"""

from __future__ import annotations

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
