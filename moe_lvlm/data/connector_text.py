"""The words that a connector reads beside an image.

L tokens
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moe_lvlm.data.errors import TemplateError

_UNLIMITED = 10**9  # transformers writes a huge number where a tokenizer knows no length


class ConnectorText:
    """Words as ids of the Q-Former's tokenizer, the token that routers read first.

    That is the classifier token, as BERT's tokenizer puts it by itself. Where a tokenizer puts none, it is prepended, or
    the bos token where there is no other. More tokens than the tokenizer's `model_max_length` are cut on the right, what
    it puts at the end staying. Raises TemplateError when built if there is neither token, or none to pad with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.pad_token_id is None:
            raise TemplateError("the Q-Former's tokenizer has no pad_token; set one (padding takes part in nothing)")
        self._tokenizer = tokenizer
        firsts = [one for one in (tokenizer.cls_token_id, tokenizer.bos_token_id) if one is not None]
        if not firsts:
            raise TemplateError(
                "the Q-Former's tokenizer has neither cls_token nor bos_token; one must stand first, routers read it"
            )
        own_ids = tokenizer("a")["input_ids"]
        self._prepended = [] if own_ids[:1] and own_ids[0] in firsts else firsts[:1]
        longest = tokenizer.model_max_length
        self._max_length = None if longest > _UNLIMITED else longest - len(self._prepended)

    def __call__(self, words: str) -> Tensor:
        """Int64 [L], at least the first token."""
        ids = self._tokenizer(
            words, truncation=self._max_length is not None, max_length=self._max_length, verbose=False
        )["input_ids"]
        return torch.tensor(self._prepended + ids, dtype=torch.int64)
