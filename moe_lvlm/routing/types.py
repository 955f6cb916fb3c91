"""What routers read and return.

B batch   S sequence   N samples   T tokens (B x S, flattened once, in the MoE layer)   E experts
R routed rows (tokens, or samples for sample-level routers)   K slots a row
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Modality(IntEnum):
    """Kind of a position. Every position that is neither an image token nor padding is language (SPEC: L)."""

    PADDING = 0
    LANGUAGE = 1
    VISION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingContext:
    """Facts about the tokens of one batch, made by the collator (or derived from input_ids) and read by routers.

    All describe tokens, so packed rows, several images a sample and text-only samples are nothing special.

    modality_BS: int8, a `Modality` each.
    image_BS: int32, index in the batch of the image that a vision token belongs to, -1 elsewhere.
    sample_BS: int32, index in the batch of the sample that a token belongs to, -1 at padding.
    instruction_BS: bool, tokens of the user's turns, or None if not known.
    task_N: int64, task of each sample, or None. cluster_N: int64, its instruction cluster, or None.
    """

    modality_BS: Tensor
    image_BS: Tensor
    sample_BS: Tensor
    instruction_BS: Tensor | None = None
    task_N: Tensor | None = None
    cluster_N: Tensor | None = None

    @property
    def modality_T(self) -> Tensor:
        return self.modality_BS.flatten()

    @property
    def image_T(self) -> Tensor:
        return self.image_BS.flatten()

    @property
    def sample_T(self) -> Tensor:
        return self.sample_BS.flatten()

    def to(self, device: torch.device | str) -> RoutingContext:
        """The same facts on another device."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        return RoutingContext(
            modality_BS=self.modality_BS.to(device, non_blocking=True),
            image_BS=self.image_BS.to(device, non_blocking=True),
            sample_BS=self.sample_BS.to(device, non_blocking=True),
            instruction_BS=move(self.instruction_BS),
            task_N=move(self.task_N),
            cluster_N=move(self.cluster_N),
        )

    @staticmethod
    def all_language(shape_BS: tuple[int, int], device: torch.device) -> RoutingContext:
        """Text without padding: what a plain causal language model routes by when no context is given."""
        batch, sequence = shape_BS
        sample_B = torch.arange(batch, dtype=torch.int32, device=device)
        return RoutingContext(
            modality_BS=torch.full(shape_BS, int(Modality.LANGUAGE), dtype=torch.int8, device=device),
            image_BS=torch.full(shape_BS, -1, dtype=torch.int32, device=device),
            sample_BS=sample_B[:, None].expand(batch, sequence),
        )


class RoutingDecision(NamedTuple):
    """Which experts take which row, and with what weight. A tuple, since ZeRO-3's hooks look into nothing else.

    logits_RE: float32, scores before the softmax.
    probs_RE: float32, softmax over all experts (LTDR's P).
    expert_ids_RK: int64, best first. A slot that keep_RK leaves out carries no row and weight 0.
    weights_RK: float32, in the combination of expert outputs.
    keep_RK: bool; the number of kept slots may differ from row to row, and is 0 at padding.
    level: what a row is.
    """

    logits_RE: Tensor
    probs_RE: Tensor
    expert_ids_RK: Tensor
    weights_RK: Tensor
    keep_RK: Tensor
    level: Literal["token", "sample"] = "token"

    def detach(self) -> RoutingDecision:
        """The same decision outside the graph."""
        return RoutingDecision(
            self.logits_RE.detach(),
            self.probs_RE.detach(),
            self.expert_ids_RK,
            self.weights_RK.detach(),
            self.keep_RK,
            self.level,
        )
