"""What the adapters of one decoder layer know of the batch while the layer runs.

B batch   S sequence   N samples   T tokens (B x S)   I inputs of a linear
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import RoutingContext


class BatchFacts:
    """A context and a trace, and what follows from them: computed once a layer, when a linear first asks."""

    def __init__(self, context: RoutingContext, trace: RoutingTrace | None) -> None:
        self.context = context
        self.trace = trace

    @cached_property
    def num_samples(self) -> int:
        return self.context.count_samples()

    @property
    def num_rows(self) -> int:
        """Rows of a gate that decides by sample: one where there is no sample, since every rank calls the same."""
        return max(self.num_samples, 1)

    @cached_property
    def sample_T(self) -> Tensor:
        """Int64 [T]; padding, whose output matters to nobody, goes with sample 0."""
        return self.context.sample_T.clamp(min=0).long()

    @cached_property
    def sample_B(self) -> Tensor:
        """Int64 [B]: the sample of each row that holds one; sample 0 for a row of padding."""
        return self.context.sample_BS.amax(dim=1).clamp(min=0).long()

    @cached_property
    def is_packed(self) -> bool:
        """Whether some row holds tokens of several samples: a look at the device where the context does not say."""
        if self.context.is_packed is not None:
            return self.context.is_packed
        return are_rows_packed(self.context.sample_BS)

    @cached_property
    def place_T(self) -> Tensor:
        """Int64 [T]: how many tokens of the same sample come before each, whatever padding lies between."""
        sample_T = torch.where(self.context.sample_T < 0, self.num_rows, self.context.sample_T).long()
        order_T = sample_T.argsort(stable=True)
        count_N = sample_T.new_zeros(self.num_rows + 1).scatter_add(0, sample_T, torch.ones_like(sample_T))
        start_N = count_N.cumsum(0) - count_N
        place_T = torch.empty_like(sample_T)
        place_T[order_T] = torch.arange(len(sample_T), device=sample_T.device) - start_N[sample_T[order_T]]
        return place_T

    @cached_property
    def instruction_NT(self) -> Tensor:
        """Float32 [N, T]: 1 / count at the tokens of each sample's instruction, 0 elsewhere.

        Raises:
            ValueError: it is not known what the instruction is, or a sample has none.
        """
        if self.num_samples == 0:
            return torch.zeros(1, self.context.sample_T.numel(), device=self.context.sample_T.device)
        if self.context.instruction_BS is None:
            raise ValueError(
                "adapter gating sentence: it is not known which tokens are the instruction; give instruction_mask "
                "[B, S] beside input_ids, or a routing context"
            )
        sample_N1 = torch.arange(self.num_samples, device=self.context.sample_T.device)[:, None]
        is_asking_NT = (self.context.sample_T == sample_N1) & self.context.instruction_BS.flatten()
        count_N = is_asking_NT.sum(dim=1)
        if bool((count_N == 0).any()):
            raise ValueError(f"adapter gating sentence: sample {int(count_N.argmin())} of the batch has no instruction")
        return is_asking_NT.float() / count_N[:, None]


def are_rows_packed(sample_BS: Tensor) -> bool:
    """Whether some row holds tokens of several samples."""
    sample_B1 = sample_BS.amax(dim=1, keepdim=True)
    return bool(((sample_BS != sample_B1) & (sample_BS >= 0)).any())
