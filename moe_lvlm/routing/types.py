"""What routers read and return.

B batch   S sequence   N samples   T tokens (B x S, flattened once, in the MoE layer)   E experts   G embedding
R routed rows (tokens, or samples or images for routers of that level)   K slots a row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LANGUAGE_MODEL = "language_model"
CONNECTOR = "connector"
"""Parts of a `Site`: the language model, and what stands between it and the vision tower."""


class Site(NamedTuple):
    """Where a decision is made: the part of the model, and the index of the layer in it."""

    part: str
    layer: int


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
    num_samples: how many samples there are, 0 to N; None where nobody counted them.
    instruction_BS: bool, tokens of the user's turns, or None if not known.
    task_N: int64, task of each sample, -1 where it has none; or None if not known.
    cluster_N: int64, its instruction cluster; or None if not known.
    dataset_N: int64, index of its dataset in the mixture; or None if not known.
    embedding_NG: rows of the adapters' table for each sample (at least one row), looked up once a forward pass
        (`adapters.look_up`), so that ZeRO-3 gathers the table there and nowhere else; None where no adapter reads it.
    draw_N: int64, a number of the draw that brought the sample, the same however draws are batched and spread over
        processes: what is random about a sample is drawn from it (`routing.noise`). None if not known.
    attention_BS: float32, how much the instruction attends to each token in the layer at hand, None where no router
        wants to know (LTDR's IAT). The one fact that differs between layers.
    is_packed: whether a row of the batch may hold tokens of several samples; None where nobody looked.
    prompt: what was decided for each sample at each site when its prompt was read; None unless this call goes on after
        cached positions. Routers that decide for whole samples decide once.
    """

    modality_BS: Tensor
    image_BS: Tensor
    sample_BS: Tensor
    num_samples: int | None = None
    instruction_BS: Tensor | None = None
    task_N: Tensor | None = None
    cluster_N: Tensor | None = None
    dataset_N: Tensor | None = None
    embedding_NG: Tensor | None = None
    draw_N: Tensor | None = None
    attention_BS: Tensor | None = None
    is_packed: bool | None = None
    prompt: Mapping[Site, RoutingDecision] | None = None

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

        return replace(
            self,
            modality_BS=self.modality_BS.to(device, non_blocking=True),
            image_BS=self.image_BS.to(device, non_blocking=True),
            sample_BS=self.sample_BS.to(device, non_blocking=True),
            instruction_BS=move(self.instruction_BS),
            task_N=move(self.task_N),
            cluster_N=move(self.cluster_N),
            dataset_N=move(self.dataset_N),
            embedding_NG=move(self.embedding_NG),
            draw_N=move(self.draw_N),
        )

    def count_samples(self) -> int:
        """The number of samples, counted where nobody did: a look of the host at the device."""
        if self.num_samples is not None:
            return self.num_samples
        return int(self.sample_BS.max()) + 1 if self.sample_BS.numel() else 0

    @staticmethod
    def all_language(shape_BS: tuple[int, int], device: torch.device) -> RoutingContext:
        """Text without padding: what a plain causal language model routes by when no context is given."""
        batch, sequence = shape_BS
        sample_B = torch.arange(batch, dtype=torch.int32, device=device)
        return RoutingContext(
            modality_BS=torch.full(shape_BS, int(Modality.LANGUAGE), dtype=torch.int8, device=device),
            image_BS=torch.full(shape_BS, -1, dtype=torch.int32, device=device),
            sample_BS=sample_B[:, None].expand(batch, sequence),
            num_samples=batch,
        )


class RoutingDecision(NamedTuple):
    """Which experts take which row, and with what weight. A tuple, since ZeRO-3's hooks look into nothing else.

    logits_RE: float32, scores before the softmax.
    probs_RE: float32, softmax over all experts that the row may choose (LTDR's P), 0 for others.
    expert_ids_RK: int64, best first. A slot that keep_RK leaves out carries no row and weight 0.
    weights_RK: float32, in the combination of expert outputs.
    keep_RK: bool; the number of kept slots may differ from row to row, and is 0 at padding.
    level: what a row is: a token of the batch; a sample, all of whose tokens go the same way; or an image, whose visual
        tokens do (decisions of a connector).
    dropped_RK: bool, slots that were chosen and left out for want of capacity; None where nothing is ever dropped.
    penalty: float32 scalar, an auxiliary loss of the router itself, coefficient and all; None if it has none.
    unrouted_D: float32, detached, sum of the hidden states of tokens that want an expert and take none; None where a
        router does not ask for new experts.
    probe_RK: float32 zeros, whose gradient the experts answer with cosines of gradients (`ExpertRows`, STGC); None
        where the router does not ask.
    conflict_RK: bool, kept slots whose token is in conflict at their expert (STGC); all False until the backward pass
        writes into it. None where the router does not ask.
    fills_slots: whether the host knows that every slot is kept, but for those of padding. Who executes the decision then
        needs no look at how many are.
    """

    logits_RE: Tensor
    probs_RE: Tensor
    expert_ids_RK: Tensor
    weights_RK: Tensor
    keep_RK: Tensor
    level: Literal["token", "sample", "image"] = "token"
    dropped_RK: Tensor | None = None
    penalty: Tensor | None = None
    unrouted_D: Tensor | None = None
    probe_RK: Tensor | None = None
    conflict_RK: Tensor | None = None
    fills_slots: bool = False

    def detach(self) -> RoutingDecision:
        """The same decision outside the graph."""
        return self._replace(
            logits_RE=self.logits_RE.detach(),
            probs_RE=self.probs_RE.detach(),
            weights_RK=self.weights_RK.detach(),
            penalty=None if self.penalty is None else self.penalty.detach(),
            probe_RK=None if self.probe_RK is None else self.probe_RK.detach(),
        )

    def by_token(self, context: RoutingContext) -> RoutingDecision:
        """The same decision with a row a token, 0 and nothing kept at padding.

        Raises:
            ValueError: a token-level decision about another number of tokens.
        """
        sample_T = context.sample_T
        if self.level == "token":
            if self.probs_RE.shape[0] != sample_T.shape[0]:
                raise ValueError(
                    f"the decision has {self.probs_RE.shape[0]} rows and the context {sample_T.shape[0]} tokens; "
                    "a token-level decision needs one row a token"
                )
            return self
        owner_T = sample_T if self.level == "sample" else context.image_T
        is_token_T1 = (owner_T >= 0)[:, None]
        row_T = owner_T.clamp(min=0).long()
        first_K = torch.arange(self.expert_ids_RK.shape[1], device=sample_T.device)
        return self._replace(
            logits_RE=self.logits_RE[row_T] * is_token_T1,
            probs_RE=self.probs_RE[row_T] * is_token_T1,
            # any distinct experts do where none is kept
            expert_ids_RK=self.expert_ids_RK[row_T].where(is_token_T1, first_K),
            weights_RK=self.weights_RK[row_T] * is_token_T1,
            keep_RK=self.keep_RK[row_T] & is_token_T1,
            level="token",
            dropped_RK=None if self.dropped_RK is None else self.dropped_RK[row_T] & is_token_T1,
        )
