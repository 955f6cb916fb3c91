"""One stage: its engine, its data, its loop."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_lvlm.analysis.measures import LoadCounter
from moe_lvlm.checkpoint.background import CheckpointWriter
from moe_lvlm.checkpoint.base import Base
from moe_lvlm.checkpoint.engine import live_engine
from moe_lvlm.checkpoint.ranks import current_ranks
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.restore import restore_training_state
from moe_lvlm.checkpoint.rng import capture_rng, restore_rng
from moe_lvlm.checkpoint.save import SaveReport, prepare_save
from moe_lvlm.config.deepspeed import resolve_deepspeed
from moe_lvlm.config.recipe import Recipe, StageSettings
from moe_lvlm.data.balance import step_balance
from moe_lvlm.data.ledger import BadSampleLedger
from moe_lvlm.data.loader import MicroBatch, StepLoader
from moe_lvlm.data.order import StepOrder
from moe_lvlm.models.packed_attention import attend_within_samples
from moe_lvlm.models.processor import Processor
from moe_lvlm.parallel.engine import start_engine
from moe_lvlm.parallel.process_group import World, group_timeout, set_group_timeouts
from moe_lvlm.training.adaptation import ExpertAdaptation
from moe_lvlm.training.base import plan_base
from moe_lvlm.training.build import build_stage_model
from moe_lvlm.training.checkpointing import enable_checkpointing
from moe_lvlm.training.data import open_stage_data
from moe_lvlm.training.folder import BAD_SAMPLES, CHECKPOINTS
from moe_lvlm.training.interrupt import Interrupt
from moe_lvlm.training.log import RunLog
from moe_lvlm.training.memory import parameter_table
from moe_lvlm.training.optimizer import learning_rate_at, parameter_groups
from moe_lvlm.training.state import TrainState
from moe_lvlm.training.step import StepCounts, StepLosses, count_step, run_step
from moe_lvlm.training.watchdog import Phase, Watchdog


class TrainingDivergedError(RuntimeError):
    """Gradients are no longer numbers. The newest checkpoint is from before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What stays the same over all stages of a run."""

    recipe: Recipe
    folder: Path
    world: World
    processor: Processor
    log: RunLog
    interrupt: Interrupt
    watchdog: Watchdog
    writer: CheckpointWriter


@dataclass(slots=True)
class _SinceLog:
    """What has been done since the last logged step. moment, waited: the clock's and the loader's seconds then. tokens,
    positions: trained on from then on, all ranks', without padding and with it."""

    moment: float
    waited: float
    tokens: int = 0
    positions: int = 0


class Stage:
    """A stage in training. `run()` takes it to its end, or to the step after which the run was asked to stop."""

    def __init__(self, run: Run, state: TrainState, checkpoint: Path | None) -> None:
        """checkpoint: where weights come from; at a step > 0 of this stage everything else too."""
        self._run = run
        self.state = state
        self._settings: StageSettings = run.recipe.stages[state.stage]
        self._beat("load")
        self._order, self._loader = self._open_data()
        self._beat("load")
        self.num_steps = self._settings.steps or math.ceil(
            (self._settings.epochs or 0) * self._order.epoch_size / self._settings.global_batch
        )
        ledger_limit = run.recipe.data.bad_sample_limit
        self._ledger = BadSampleLedger(run.folder / BAD_SAMPLES, limit=ledger_limit, epoch_size=self._order.epoch_size)
        self._skipped_in_a_row = 0
        self._saved = None if checkpoint is None else checkpoint.name
        self._base: Base | None = None  # what checkpoints leave out
        self._engine, self._adaptation = self._start(checkpoint)

    def _beat(self, phase: Phase) -> None:
        self._run.watchdog.beat(phase, stage=self._settings.name, step=self.state.step)

    def _open_data(self) -> tuple[StepOrder, StepLoader]:
        recipe = self._run.recipe
        data = open_stage_data(recipe, self.state.stage, self._run.processor)
        world = self._run.world
        loader = StepLoader(
            data.dataset,
            data.order,
            data.collator,
            rank=world.rank,
            world_size=world.size,
            num_workers=recipe.data.num_workers,
            prefetch=recipe.data.prefetch,
            balance=step_balance(recipe.data, data.dataset.length),
            has_pinned_memory=world.device.type == "cuda",
        )
        return data.order, loader

    def _start(self, checkpoint: Path | None) -> tuple[Any, ExpertAdaptation]:
        recipe, world = self._run.recipe, self._run.world
        deepspeed = resolve_deepspeed(recipe, self._settings, world.size)
        model = build_stage_model(
            recipe,
            self.state.stage,
            checkpoint,
            zero_stage=int(deepspeed["zero_optimization"].get("stage", 0)),
            device=world.device,
        )
        if recipe.data.batching == "packed":
            attend_within_samples(model.get_decoder())
        self._beat("load")
        self._base = plan_base(recipe, model, checkpoint, world=world, log=self._run.log.say)
        enable_checkpointing(model, recipe.train.gradient_checkpointing)
        groups = parameter_table(model)
        optimizer = recipe.train.optimizer
        engine = start_engine(
            model,
            parameter_groups(model, learning_rate=self._settings.learning_rate, settings=optimizer),
            optimizer_options={"lr": self._settings.learning_rate, "betas": optimizer.betas, "eps": optimizer.eps},
            config=deepspeed,
        )
        set_group_timeouts(group_timeout(recipe.train.hang_timeout))
        self._beat("load")
        torch.manual_seed((recipe.seed * 1000 + self.state.stage) * 100_003 + self.state.step * 1009 + world.rank)
        adaptation = ExpertAdaptation(engine.module, is_new_stage=self.state.step == 0)
        if checkpoint is not None and self.state.step > 0:
            opened = Checkpoint(checkpoint)
            restore_training_state(live_engine(engine), opened)
            rng = opened.rng(world.rank)
            if rng is not None and opened.state["saved_world_size"] == world.size:
                restore_rng(rng)
        engine.train()
        self._beat("load")
        self._run.log.event(
            "stage",
            stage=self._settings.name,
            index=self.state.stage,
            steps=self.num_steps,
            step=self.state.step,
            micro_batch=self._settings.micro_batch,
            global_batch=self._settings.global_batch,
            learning_rate=self._settings.learning_rate,
            trainable=sum(group.trainable for group in groups),
            total=sum(group.count for group in groups),
        )
        return engine, adaptation

    def run(self) -> bool:
        """Train to the end of the stage and save. Returns whether it was reached; False: stopped early, and saved."""
        settings, log = self._settings, self._run.log
        log.open_stage(settings.name, done=self.state.step, total=self.num_steps)
        since_log = _SinceLog(time.monotonic(), self._loader.seconds_waited)
        self._beat("step")
        try:
            for micro_batches in self._loader.steps(self.state.step, self.num_steps):
                counts = count_step(
                    micro_batches, is_stopping=self._run.interrupt.is_requested, device=self._run.world.device
                )
                if counts.stops:
                    break
                self._check_bad(micro_batches, counts)
                since_log.tokens += counts.tokens
                since_log.positions += counts.positions
                if self._train_step(micro_batches, counts, since_log):
                    since_log = _SinceLog(time.monotonic(), self._loader.seconds_waited)
                log.advance()
                self._beat("step")
                every = self._run.recipe.train.checkpoint.every
                if every and self.state.step % every == 0 and self.state.step < self.num_steps:
                    self.save(at_once=False)
        finally:
            log.close_stage()
        self.save(at_once=True)
        return self.state.step >= self.num_steps

    def _train_step(self, micro_batches: list[MicroBatch], counts: StepCounts, since_log: _SinceLog) -> bool:
        """One step; whether it was logged."""
        train = self._run.recipe.train
        step = self.state.step
        rate = learning_rate_at(
            step, num_steps=self.num_steps, peak=self._settings.learning_rate, schedule=train.schedule
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        is_logged = (step + 1) % train.log_every == 0 or step + 1 == self.num_steps
        counter = LoadCounter() if is_logged else None
        divisor = None
        if train.loss_average == "step":
            divisor = max(counts.supervised, 1) / self._order.num_micro_batches
        skipped = self._engine.skipped_steps
        losses = run_step(
            self._engine,
            micro_batches,
            divisor=divisor,
            device=self._run.world.device,
            counter=counter,
            adaptation=self._adaptation,
        )
        norm = self._engine.get_global_grad_norm()
        has_skipped = self._engine.skipped_steps > skipped
        self._check_finite(None if norm is None else float(norm), has_skipped=has_skipped)
        self._adapt_experts(has_skipped=has_skipped)
        self.state = self.state.after_step(samples=self._settings.global_batch, bad=counts.bad, tokens=counts.tokens)
        if counter is not None:
            self._log_step(losses, counter, rate, None if norm is None else float(norm), since_log)
        return is_logged

    def _adapt_experts(self, *, has_skipped: bool) -> None:
        step = self.state.step + 1
        report = self._adaptation.finish_step(step, lambda: live_engine(self._engine), has_skipped=has_skipped)
        if report is None:
            return
        self._run.log.event("experts", stage=self._settings.name, step=step, layers=report)
        for layer, values in report.items():
            if values["added"] or values["removed"]:
                self._run.log.say(
                    f"step {step}, layer {layer}: experts added {values['added']}, removed {values['removed']}; "
                    f"{values['active']} active"
                )

    def _log_step(
        self,
        losses: StepLosses,
        counter: LoadCounter,
        rate: float,
        norm: float | None,
        since_log: _SinceLog,
    ) -> None:
        for tensor in counter.tensors():
            dist.all_reduce(tensor)
        num = self._order.num_micro_batches
        language = _mean_over_step(losses.language, num)
        balance = None if losses.balance is None else _mean_over_step(losses.balance, num)
        seconds = time.monotonic() - since_log.moment
        values = {
            "stage": self._settings.name,
            "step": self.state.step,
            "global_step": self.state.global_step,
            "loss": language + (balance or 0.0),
            "language_loss": language,
            "balance_loss": balance,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": since_log.tokens,
            "tokens_per_second": since_log.tokens / max(seconds, 1e-9),
            "padding": 1 - since_log.tokens / max(since_log.positions, 1),
            "seconds": seconds,
            "data_seconds": self._loader.seconds_waited - since_log.waited,
            "epoch": self._order.epoch_at(self.state.step),
            **counter.summary(),
        }
        self._run.log.event("step", **values)
        self._run.log.show(self._settings.name, self.state.step, self.num_steps, values)

    def _check_finite(self, norm: float | None, *, has_skipped: bool) -> None:
        """The norm is global, so all ranks decide alike."""
        limit = self._run.recipe.train.max_skipped_steps
        if has_skipped:
            self._skipped_in_a_row += 1
            self._run.log.event("skipped", step=self.state.step + 1, reason="gradients are not finite")
            self._run.log.say(f"step {self.state.step + 1}: skipped, its gradients are not finite")
            if self._skipped_in_a_row >= limit:
                raise TrainingDivergedError(f"{limit} steps in a row had gradients that are not finite")
            return
        self._skipped_in_a_row = 0
        if norm is not None and not math.isfinite(norm):
            raise TrainingDivergedError(
                f"stage {self._settings.name}, step {self.state.step + 1}: the gradient norm is {norm}; the newest "
                "checkpoint is from before this step. Try a lower learning_rate"
            )

    def _check_bad(self, micro_batches: list[MicroBatch], counts: StepCounts) -> None:
        if not counts.bad:
            return
        mine = [error for one in micro_batches for error in one.bad]
        for errors in current_ranks().all_gather(mine):
            if self._run.world.is_first:
                self._ledger.add(errors)
        seen = self.state.samples + counts.seen
        outcome: list[Exception | None] = [None]
        if self._run.world.is_first:
            outcome = [_catch(lambda: self._ledger.check(self.state.bad + counts.bad, seen))]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            raise outcome[0]

    def save(self, *, at_once: bool) -> None:
        """A checkpoint of this moment, unless there is one; at the end of a stage it stays for good.

        at_once: return when it is there, and an earlier one too; otherwise it may be written beside training.
        """
        recipe, world, writer = self._run.recipe, self._run.world, self._run.writer
        self._beat("save")
        name = f"{self._settings.name}-{self.state.step:06d}"
        if name == self._saved:
            writer.wait()
            return
        state = replace(
            self.state,
            world_size=world.size,
            expert_parallel_size=recipe.parallel.expert_parallel_size,
            zero_stage=self._engine.zero_optimization_stage(),
            is_stage_done=self.state.step >= self.num_steps,
        )
        writer.wait()  # what it leaves half done would be taken for the work of a killed process
        self._beat("save")
        prepared = prepare_save(
            self._run.folder / CHECKPOINTS,
            name,
            live_engine(self._engine),
            config=json.loads(self._engine.module.config.to_json_string()),
            state=state.to_json(),
            rng=capture_rng(),
            ranks=current_ranks(),
            log=self._run.log.say,
            base=self._base,
        )
        self._beat("save")
        writer.finish(
            prepared,
            at_once=at_once,
            keep_last=recipe.train.checkpoint.keep_last,
            protect=self._kept(),
            done=self._log_saved,
        )
        self._saved = name
        self._beat("step")

    def _log_saved(self, report: SaveReport) -> None:
        self._run.log.event("checkpoint", path=str(report.path), seconds=report.seconds, bytes=report.bytes)

    def _kept(self) -> set[str]:
        """Names of the checkpoints that stay for good: ends of stages, and multiples of `keep_every`."""
        folder, keep_every = self._run.folder / CHECKPOINTS, self._run.recipe.train.checkpoint.keep_every
        kept = {f"{self._settings.name}-{self.num_steps:06d}"}
        for index, stage in enumerate(self._run.recipe.stages[: self.state.stage + 1]):
            steps = {int(path.name[-6:]): path.name for path in folder.glob(f"{stage.name}-??????")}
            if steps and index < self.state.stage:
                kept.add(steps[max(steps)])
            kept |= {name for step, name in steps.items() if keep_every and step % keep_every == 0}
        return kept

    def close(self) -> None:
        """Give the engine's memory back."""
        self._beat("close")
        self._engine.destroy()


def _mean_over_step(total: torch.Tensor, num_micro_batches: int) -> float:
    total = total.clone().double()
    dist.all_reduce(total)
    return float(total) / num_micro_batches


def _catch(check: Any) -> Exception | None:
    """The ValueError that a check on one rank raises, to be raised on all."""
    try:
        check()
    except ValueError as error:
        return error
    return None
