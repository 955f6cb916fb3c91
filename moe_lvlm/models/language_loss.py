"""The loss of the next token, and what is added to it.

B batch   S sequence   D model width   V vocabulary   n supervised positions
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
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


class Supervised(NamedTuple):
    """The positions of a batch whose next token has a loss. position_n: int64, b * S + s, in order. target_n: that token."""

    position_n: Tensor
    target_n: Tensor

    @staticmethod
    def of(labels_BS: Tensor) -> Supervised:
        """labels_BS: not shifted, -100 where there is no loss. The host looks at how many there are."""
        next_BS = nn.functional.pad(labels_BS[:, 1:], (0, 1), value=-100).flatten()
        position_n = (next_BS != -100).nonzero().squeeze(1)
        return Supervised(position_n, next_BS[position_n])

    def select(self, hidden_BSD: Tensor) -> Tensor:
        """Their rows, [n, D]."""
        return hidden_BSD.flatten(0, 1).index_select(0, self.position_n)

    def columns(self, length: int) -> tuple[Tensor, Supervised]:
        """The columns [U] in which any row of the batch has one, and the same positions among these alone; for language
        models that can leave out columns, not positions. length: S."""
        column_U, place_n = (self.position_n % length).unique(return_inverse=True)
        return column_U, Supervised(self.position_n // length * len(column_U) + place_n, self.target_n)

    def loss(self, logits_nV: Tensor, *, num_items_in_batch: Tensor | None) -> Tensor:
        """As `language_loss`, from the logits at these positions alone."""
        total = nn.functional.cross_entropy(logits_nV.float(), self.target_n, reduction="sum")
        return total / (
            max(len(self.target_n), 1) if num_items_in_batch is None else num_items_in_batch.to(total.device)
        )


class Losses(NamedTuple):
    """total: language plus balance. balance: auxiliary losses of routers. None where there is none."""

    total: Tensor | None = None
    language: Tensor | None = None
    balance: Tensor | None = None


def sum_losses(language: Tensor, balance: Tensor | None) -> Losses:
    """Both, and what they come to."""
    return Losses(language if balance is None else language + balance, language, balance)
