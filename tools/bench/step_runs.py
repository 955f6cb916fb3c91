"""Steps that are tried, timed and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from bench.check import CheckError
from bench.measure import MIB, synchronize
from bench.step_engines import AllLogits, HeldEngine, Watched, divisor_of, recipe_of, set_checkpointing, with_features
from bench.step_estimate import StepOnPaper
from bench.step_samples import StepSamples
from bench.step_variants import Setting
from moe_lvlm.analysis.measures import LoadCounter
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.loader import MicroBatch
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.parallel.process_group import World
from moe_lvlm.routing.types import Modality
from moe_lvlm.training.step import StepCounts, StepLosses, count_step, run_step

# Losses and norms of gradients against those of `ours`: float32 sums in another order, and bf16's 8 bits
_TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2)}


@dataclass(frozen=True, slots=True)
class Trial:
    """What one step showed before any was timed. loss: of the language model, over the step's tokens. rows: routed rows
    over all layers, this process's. tail_share: of all tokens, to as many experts as the tail may use."""

    loss: float
    gradient_norm: float
    saved_mib: float
    dropped: int
    rows: int
    tail_share: float


class StepRun:
    """A variant's step on an engine. Every call is the same work."""

    def __init__(
        self, held: HeldEngine, setting: Setting, recipe: Recipe, stage: int, samples: StepSamples, world: World
    ) -> None:
        self.setting = setting
        self._held = held
        self._recipe, self._stage, self._world = recipe, stage, world
        batches = samples.batches(is_packed=setting.is_packed)
        self.counts: StepCounts = count_step(batches, is_stopping=False, device=world.device)
        self.shapes = [_shape(one) for one in batches]
        self._batches = with_features(held.model, batches, world.device) if setting.is_cached else batches
        settings = recipe.stages[stage]
        self._divisor = None
        if recipe.train.loss_average == "step":
            self._divisor = divisor_of(settings, self.counts.supervised)

    @property
    def num_images(self) -> int:
        """Of this process's micro-batches."""
        return sum(shape.num_images for shape in self.shapes)

    def step(self, watched: Watched | None = None, counter: LoadCounter | None = None) -> StepLosses:
        """One optimizer step. watched: what stands around this run's engine."""
        set_checkpointing(self._held.model, self.setting.checkpointed)
        return run_step(
            watched or self._engine(),
            self._batches,
            divisor=self._divisor,
            device=self._world.device,
            counter=counter,
        )

    def _engine(self) -> Any:
        return AllLogits(self._held.engine) if self.setting.has_all_logits else self._held.engine

    def seconds(self, clock: Callable[[], float]) -> float:
        """How long a step takes, all processes together."""
        set_checkpointing(self._held.model, self.setting.checkpointed)
        if self._world.size > 1:
            dist.barrier()
        synchronize(self._world.device)
        start = clock()
        self.step()
        synchronize(self._world.device)
        return clock() - start

    def peak_mib(self) -> float | None:
        """Peak MiB of device memory in a step above what lay there before; None where the device does not tell (CPU)."""
        device = self._world.device
        if device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.step()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB

    def try_out(self) -> Trial:
        """One step, watched."""
        watched, counter = Watched(self._engine()), LoadCounter()
        losses = self.step(watched, counter)
        summary = counter.summary()
        load = summary["expert_load"] or {}
        rows = sum(sum(sum(row) for row in one.values()) for one in load.values())
        mine = sum(shape.tokens for shape in self.shapes)
        dropped = watched.dropped + sum(
            sum(sum(row) for row in one.values()) for one in (summary.get("dropped") or {}).values()
        )
        loss, all_dropped = self.sum_over_processes(float(losses.language), dropped)
        settings = self._recipe.stages[self._stage]
        return Trial(
            loss=loss / (settings.global_batch // settings.micro_batch),
            gradient_norm=float(self._held.engine.get_global_grad_norm()),
            saved_mib=watched.saved_mib,
            dropped=round(all_dropped),
            rows=rows,
            tail_share=_tail_share(self._recipe, rows / max(len(load), 1) / mine) if load else 0.0,
        )

    def on_paper(self, tail_share: float, known: dict[object, StepOnPaper]) -> StepOnPaper:
        """The same step for counting. tail_share: as a trial has measured it; other stacks have no tail. known: what was
        made before, by what tells one from another; what is made is added."""
        # what is masked is no work that is needed
        kind = "ours" if self.setting.kind == "masked" else self.setting.kind
        shapes = tuple(replace(shape, tail_share=tail_share if kind == "ours" else 0.0) for shape in self.shapes)
        recipe = recipe_of(self._recipe, self._stage, kind)
        key = (repr(recipe.moe), repr(recipe.stages), shapes, self.setting.is_cached)
        if key not in known:
            known[key] = StepOnPaper(
                recipe, self._stage, shapes, world_size=self._world.size, has_tower=not self.setting.is_cached
            )
        return known[key]

    def sum_over_processes(self, *values: float) -> list[float]:
        """Sums of each process's values."""
        total = torch.tensor(values, dtype=torch.float64, device=self._world.device)
        dist.all_reduce(total)
        return total.tolist()


def check_trial(name: str, trial: Trial, expected: Trial, *, dtype: torch.dtype, has_same_gradients: bool) -> None:
    """Compare a variant's step with another's that has the same loss; what drops assignments is let off.

    Raises:
        CheckError: they are off.
    """
    if trial.dropped or expected.dropped:
        return
    for_loss, for_norm = _TOLERANCES[dtype]
    pairs = [("loss", trial.loss, expected.loss, for_loss)]
    if has_same_gradients:
        pairs.append(("gradient norm", trial.gradient_norm, expected.gradient_norm, for_norm))
    for what, value, target, tolerance in pairs:
        if not abs(value - target) <= tolerance * abs(target):
            raise CheckError(f"{name}: {what} {value:.6g} instead of {target:.6g}; allowed: off by {tolerance:g} of it")


def _shape(micro_batch: MicroBatch) -> BatchShape:
    batch: Any = micro_batch.batch
    packed = batch.get("sample_lengths")
    is_token_BS = batch["routing"].modality_BS != Modality.PADDING
    lengths: Sequence[int] = packed if packed is not None else is_token_BS.sum(dim=1).tolist()
    pixels = batch.get("pixel_values")
    return BatchShape(
        sample_lengths=tuple(lengths),
        num_images=0 if pixels is None else pixels.shape[0],
        supervised=int((batch["labels"][:, 1:] != -100).sum()),
        padded_to=None if packed is not None else batch["input_ids"].shape[1],
    )


def _tail_share(recipe: Recipe, rows_per_token: float) -> float:
    """Share of tokens that take all that a token may, from the mean number of rows a token."""
    moe = recipe.moe
    most = getattr(moe.router, "tail_k", None) or moe.num_experts
    if moe.router.kind != "ltdr" or most == moe.top_k:
        return 0.0
    return min(max((rows_per_token - moe.top_k) / (most - moe.top_k), 0.0), 1.0)
