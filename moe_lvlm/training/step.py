"""One optimizer step over this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lvlm.analysis.measures import LoadCounter
from moe_lvlm.data.loader import MicroBatch
from moe_lvlm.routing.types import Modality
from moe_lvlm.training.adaptation import ExpertAdaptation

# Of a batch: facts of tokens, and what stays on the host.
_NOT_TENSORS = ("routing", "sample_lengths")


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Sums over all ranks' micro-batches of a step.

    supervised: tokens with a loss. tokens: without padding. bad, seen: draws. stops: ranks that were asked to stop.
    positions: tokens and padding.
    """

    supervised: int
    tokens: int
    bad: int
    seen: int
    stops: int
    positions: int


def count_step(micro_batches: Sequence[MicroBatch], *, is_stopping: bool, device: torch.device) -> StepCounts:
    """Count what all ranks are about to train on: the step's loss is divided by its own supervised tokens."""
    counts = torch.tensor(
        [
            sum(int((one.batch["labels"][:, 1:] != -100).sum()) for one in micro_batches),
            sum(int((one.batch["routing"].modality_BS != Modality.PADDING).sum()) for one in micro_batches),
            sum(len(one.bad) for one in micro_batches),
            sum(one.num_seen for one in micro_batches),
            int(is_stopping),
            sum(one.batch["input_ids"].numel() for one in micro_batches),
        ],
        device=device,
    )
    dist.all_reduce(counts)
    return StepCounts(*counts.tolist())


@dataclass(frozen=True, slots=True)
class StepLosses:
    """This rank's sums over its micro-batches, detached scalars. balance: None without a balance loss."""

    language: Tensor
    balance: Tensor | None


def run_step(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    *,
    divisor: float | None,
    device: torch.device,
    counter: LoadCounter | None,
    adaptation: ExpertAdaptation | None = None,
) -> StepLosses:
    """Forward, backward and one optimizer step.

    divisor: of each micro-batch's summed token losses. DeepSpeed averages over micro-batches and ranks, so the step's
    supervised tokens over its number of micro-batches gives the mean over the step's tokens. None averages each
    micro-batch by itself. counter, adaptation: take the routing of every micro-batch, if given.
    """
    is_adapting = adaptation is not None and adaptation.is_needed
    language = torch.zeros((), device=device)
    balance: Tensor | None = None
    dtype = next(engine.module.parameters()).dtype
    for micro_batch in micro_batches:
        output = engine(
            **to_device(micro_batch.batch, device, dtype),
            num_items_in_batch=None if divisor is None else torch.tensor(divisor, device=device),
            output_routing=counter is not None or is_adapting,
            use_cache=False,
        )
        engine.backward(output.loss)
        engine.step()
        language += output.language_loss.detach()
        if output.balance_loss is not None:
            balance = output.balance_loss.detach() + (0 if balance is None else balance)
        if counter is not None and output.routing is not None:
            counter.update(output.routing.detach())
        if adaptation is not None and is_adapting:
            adaptation.count(output.routing)
    return StepLosses(language, balance)


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A batch where the model is, images in its type. From pinned memory it is copied beside the host's work."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items() if name not in _NOT_TENSORS}
    moved["routing"] = batch["routing"].to(device)
    if "sample_lengths" in batch:
        moved["sample_lengths"] = batch["sample_lengths"]
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(dtype)
    return moved
