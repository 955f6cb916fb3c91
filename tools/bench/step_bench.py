"""The measuring behind `tools/bench_step.py`: engines one after the other, their steps interleaved."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from bench.command import Result, clock_of
from bench.flops import Peak, peak_of
from bench.measure import interleave, ratio_and_spread
from bench.report import describe_hardware
from bench.rivals import UnavailableError
from bench.step_engines import HeldEngine, Kind, starts_as_dense
from bench.step_estimate import StepOnPaper
from bench.step_profile import profile_step
from bench.step_runs import StepRun, Trial, check_trial
from bench.step_samples import StepSamples, draw_samples, read_samples
from bench.step_variants import STEP_VARIANTS, Setting, StepVariant, choose_steps, settle
from bench.variants import DENSE
from moe_lvlm.config.load import load_recipe
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.estimation.hardware import hardware_of, measure_hardware
from moe_lvlm.parallel.process_group import World, join_world, leave_world
from moe_lvlm.training.build import DTYPES


def measure_steps(args: argparse.Namespace, recipe_path: str | Path, console: Console) -> tuple[Result, bool]:
    """All variants of one stage; the result, and whether Ctrl-C cut it short. args: of `tools/bench_step.py`.

    Raises:
        KeyboardInterrupt: it came before any round was complete.
        ValueError: a recipe, device or variants that cannot be; CheckError if a variant computes something else.
    """
    variants = choose_steps(args.variants)
    world = join_world()
    if world.device.type != args.device:
        raise ValueError(f"--device: {args.device}, but the trainer would take {world.device}; allowed: cpu, cuda")
    recipe, stage = _open(args, recipe_path, world.size)
    if args.size is None:
        samples = read_samples(recipe, stage, world)
    else:
        samples = draw_samples(recipe, stage, world, seed=args.seed)
    bench = StepBench(args, recipe, stage, samples, world, console)
    try:
        is_interrupted = bench.measure(variants)
    except KeyboardInterrupt:  # outside the rounds: what was measured before still counts
        is_interrupted = True
    leave_world()
    if is_interrupted and not bench.result["variants"]:
        raise KeyboardInterrupt
    return bench.result, is_interrupted


def _open(args: argparse.Namespace, path: str | Path, world_size: int) -> tuple[Recipe, int]:
    """The recipe with what the options say over it, and the stage's place."""
    recipe = load_recipe(path, args.overrides)
    stage = len(recipe.stages) - 1 if args.stage is None else recipe.stage_index(args.stage)
    settings = recipe.stages[stage]
    if args.samples is not None:
        batch = {"micro_batch": args.samples, "global_batch": args.samples * world_size}
    elif args.size is not None:
        batch = {"global_batch": settings.micro_batch * world_size}
    else:
        batch = {}
    stages = [*recipe.stages]
    stages[stage] = settings.model_copy(update=batch)
    changes: dict[str, Any] = {"stages": tuple(stages)}
    if world_size == 1:  # there is nothing to spread experts over
        changes["parallel"] = recipe.parallel.model_copy(update={"expert_parallel_size": 1})
    return recipe.model_copy(update=changes), stage


class StepBench:
    """Measures the variants of one stage. result: what `tools/bench_step.py` writes, filled as rounds are done."""

    def __init__(
        self,
        args: argparse.Namespace,
        recipe: Recipe,
        stage: int,
        samples: StepSamples,
        world: World,
        console: Console,
    ) -> None:
        self._args, self._recipe, self._stage = args, recipe, stage
        self._samples, self._world, self._console = samples, world, console
        self._peak = _peak(args, recipe, world)
        self._hardware = None
        if args.estimate:
            self._hardware = measure_hardware(world.device, devices=world.size, clock=clock_of(args))
        self._settings: dict[str, Setting] = {}
        self._papers: dict[object, StepOnPaper] = {}
        self._trials: dict[str, Trial] = {}
        self.result: Result = {
            "hardware": describe_hardware(world.device),
            "config": self._config(),
            "variants": {},
            "unavailable": {},
        }

    def _config(self) -> dict[str, Any]:
        args, recipe = self._args, self._recipe
        settings = recipe.stages[self._stage]
        return {
            "recipe": recipe.name,
            "stage": settings.name,
            "overrides": list(args.overrides),
            "precision": recipe.train.precision,
            "deepspeed": recipe.parallel.deepspeed,
            "expert_parallel_size": recipe.parallel.expert_parallel_size,
            "batching": recipe.data.batching,
            "gradient_checkpointing": recipe.train.gradient_checkpointing,
            "micro_batch": settings.micro_batch,
            "global_batch": settings.global_batch,
            "world_size": self._world.size,
            "device": args.device,
            "clock": args.clock,
            "repeats": args.repeats,
            "warmup": args.warmup,
            "seed": args.seed,
            "peak": {"tflops": self._peak.flops / 1e12, "source": self._peak.source},
            "is_checked": args.check,
            "samples": settings.global_batch,
        }

    def measure(self, variants: tuple[StepVariant, ...]) -> bool:
        """All of them; whether Ctrl-C ended it.

        Raises:
            ValueError: the dense floor, or the recipe as given, does not fit the device; CheckError.
        """
        able = [variant for variant in variants if self._can_settle(variant)]
        by_kind: dict[Kind, list[StepVariant]] = {}
        for variant in able:
            by_kind.setdefault(self._settings[variant.name].kind, []).append(variant)
        floor_kind, floors = next(iter(by_kind.items()))  # the floor comes first
        runs = self._try_all(floors, self._start(floor_kind))
        others = {kind: members for kind, members in by_kind.items() if kind != floor_kind}
        if not others:
            return self._time(floors, runs)
        floor = {DENSE: runs[DENSE]}
        return any(self._measure_kind(kind, members, floor) for kind, members in others.items())

    def _measure_kind(self, kind: Kind, members: list[StepVariant], floor: dict[str, StepRun]) -> bool:
        """The variants on one more engine, beside the floor; whether Ctrl-C ended it."""
        try:
            held = self._start(kind)
        except (UnavailableError, torch.OutOfMemoryError) as error:
            for variant in members:
                self._leave_out(variant, _reason(error))
            return False
        runs = self._try_all(members, held)
        is_interrupted = bool(runs) and self._time(members, floor | runs)
        runs.clear()
        held.stop()
        return is_interrupted

    def _try_all(self, members: list[StepVariant], held: HeldEngine) -> dict[str, StepRun]:
        """A run for each variant that fits the device and computes what it should."""
        runs = {}
        for variant in members:
            try:
                run = StepRun(held, self._settings[variant.name], self._recipe, self._stage, self._samples, self._world)
                trial = run.try_out()
            except UnavailableError as error:
                self._leave_out(variant, str(error))
                continue
            except torch.OutOfMemoryError as error:
                if variant.name == DENSE or self._world.size > 1:
                    raise
                self._leave_out(variant, _reason(error))
            else:
                if self._args.check:
                    self._check(variant, trial)
                self._trials[variant.name] = trial
                runs[variant.name] = run
                continue
            held.renew()  # it was left in the middle of a step
        return runs

    def _check(self, variant: StepVariant, trial: Trial) -> None:
        dtype = DTYPES[self._recipe.train.precision]
        same = next((self._trials[one.name] for one in STEP_VARIANTS if one.is_same and one.name in self._trials), None)
        if variant.is_same and same is not None:
            check_trial(variant.name, trial, same, dtype=dtype, has_same_gradients=True)
        if DENSE in self._trials and starts_as_dense(self._recipe.moe):
            check_trial(variant.name, trial, self._trials[DENSE], dtype=dtype, has_same_gradients=False)

    def _time(self, members: list[StepVariant], runs: dict[str, StepRun]) -> bool:
        """Rounds of these, their rows in the result; whether Ctrl-C ended them."""
        args = self._args
        with Progress(
            *Progress.get_default_columns(), TimeElapsedColumn(), console=self._console, transient=True
        ) as progress:
            task = progress.add_task("", total=(args.repeats + args.warmup) * len(runs))
            timings = interleave(
                {name: partial(run.seconds, clock_of(args)) for name, run in runs.items()},
                repeats=args.repeats,
                warmup=args.warmup,
                seed=args.seed,
                advance=lambda name: progress.update(task, advance=1, description=name),
            )
        if not timings.num_rounds:
            return True
        config = self.result["config"]
        config["rounds"] = min(timings.num_rounds, config.get("rounds", timings.num_rounds))
        config["tokens"] = runs[DENSE].counts.tokens
        config["images"] = round(runs[DENSE].sum_over_processes(runs[DENSE].num_images)[0])
        for variant in (_variant(DENSE), *members):
            if variant.name in runs and variant.name not in self.result["variants"]:
                run = runs[variant.name]
                self.result["variants"][variant.name] = self._row(
                    variant, run, timings.seconds[variant.name], timings.seconds[DENSE]
                )
                if args.profile is not None:
                    path = args.profile / f"{variant.name}.json"
                    profile_step(run.step, self._world.device, path, title=variant.label)
        return timings.is_interrupted

    def _row(self, variant: StepVariant, run: StepRun, seconds: list[float], floor: list[float]) -> dict[str, Any]:
        ratio, spread = ratio_and_spread(seconds, floor)
        median, trial = statistics.median(seconds), self._trials[variant.name]
        paper = run.on_paper(trial.tail_share, self._papers)
        needed, six_n = run.sum_over_processes(*paper.flops())
        peak = self._world.size * self._peak.flops
        row = {
            "label": variant.label,
            "dtype": self._recipe.train.precision,
            "ratio_to_dense": ratio,
            "spread": spread,
            "milliseconds": 1e3 * median,
            "tokens_per_second": run.counts.tokens / median,
            "samples_per_second": run.counts.seen / median,
            "mfu_needed": needed / median / peak,
            "mfu_six_n": six_n / median / peak,
            "tflop_needed": needed / 1e12,
            "saved_mib": trial.saved_mib,
            "peak_mib": run.peak_mib(),
            "dropped": trial.dropped,
            "padding": 1 - run.counts.tokens / run.counts.positions,
            "tail_share": trial.tail_share,
            "loss": trial.loss,
            "gradient_norm": trial.gradient_norm,
        }
        # other stacks' layers, and logits that training does not need, are nothing that is estimated
        if self._hardware is not None and run.setting.kind in ("dense", "ours") and not run.setting.has_all_logits:
            guess = paper.estimate(self._hardware, run.setting.checkpointed)
            row["estimated_milliseconds"] = 1e3 * guess.seconds
            row["estimated_saved_mib"] = guess.saved_mib
        return row

    def _can_settle(self, variant: StepVariant) -> bool:
        try:
            self._settings[variant.name] = settle(variant, self._recipe, self._stage)
        except UnavailableError as error:
            self._leave_out(variant, str(error))
            return False
        return True

    def _leave_out(self, variant: StepVariant, reason: str) -> None:
        self._console.print(f"{variant.name} cannot run: {reason}", markup=False)
        self.result["unavailable"][variant.name] = reason

    def _start(self, kind: Kind) -> HeldEngine:
        self._console.print(f"building: {kind}", markup=False)
        takes_packed = any(setting.is_packed for setting in self._settings.values())
        return HeldEngine(self._recipe, self._stage, kind, self._world, takes_packed=takes_packed)


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0]
    return f"too little memory: {text}" if isinstance(error, torch.OutOfMemoryError) else text


def _peak(args: argparse.Namespace, recipe: Recipe, world: World) -> Peak:
    """The peak that was given, the data sheet's, or what a matrix product reaches here."""
    precision = recipe.train.precision
    known = hardware_of(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    if args.peak_tflops is None and known is not None:
        return Peak(known.flops[precision], f"data sheet of {known.name}")
    return peak_of(world.device, DTYPES[precision], args.peak_tflops, clock_of(args))


def _variant(name: str) -> StepVariant:
    return next(variant for variant in STEP_VARIANTS if variant.name == name)
