"""LTDR's INSTRUCT: samples are routed by what their instruction says.

T tokens   D model width   N samples
"""

from __future__ import annotations

from torch import Tensor

from moe_lvlm.routing.router import SampleRouter
from moe_lvlm.routing.types import RoutingContext


class InstructRouter(SampleRouter):
    """The gate reads the mean hidden state of the sample's instruction tokens (LTDR appendix A.3, after LoRA-MoE).

    Answers take no part, so that generation, where the instruction is all in the prompt, decides as training did. A
    conversation of several turns has one mean over all human turns.
    """

    def describe_samples(self, x_TD: Tensor, context: RoutingContext, num_samples: int) -> Tensor:
        """Raises ValueError if it is not known what the instruction is, or a sample has none."""
        if num_samples == 0:
            return x_TD.new_zeros(1, x_TD.shape[1])
        if context.instruction_BS is None:
            raise ValueError(
                "router instruct: it is not known which tokens are the instruction; give instruction_mask [B, S] "
                "beside input_ids, or a routing context"
            )
        is_instruction_T = context.instruction_BS.flatten() & (context.sample_T >= 0)
        sample_T = context.sample_T.clamp(min=0).long()
        sum_ND = x_TD.new_zeros(num_samples, x_TD.shape[1]).float()
        sum_ND = sum_ND.index_add(0, sample_T, x_TD.float() * is_instruction_T[:, None])
        count_N = sum_ND.new_zeros(num_samples).index_add(0, sample_T, is_instruction_T.float())
        if bool((count_N == 0).any()):
            raise ValueError(f"router instruct: sample {int(count_N.argmin())} of the batch has no instruction token")
        return sum_ND / count_N[:, None]
