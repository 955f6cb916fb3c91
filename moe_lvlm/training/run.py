"""A whole run: all stages of a recipe, from nothing or from where it stopped."""

from __future__ import annotations

import gc
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_lvlm.checkpoint.background import CheckpointWriter
from moe_lvlm.checkpoint.layout import STATE_FILE, read_json
from moe_lvlm.checkpoint.ranks import GroupRanks, current_ranks
from moe_lvlm.checkpoint.verify import newest_valid
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.models.processor import Processor
from moe_lvlm.parallel.process_group import World, batch_job, group_timeout, join_world
from moe_lvlm.training.build import run_processor
from moe_lvlm.training.folder import (
    CHECKPOINTS,
    DONE,
    PROCESSOR,
    mark_stages,
    prepare_folder,
    run_folder,
    write_facts,
)
from moe_lvlm.training.interrupt import Interrupt
from moe_lvlm.training.lock import lock_folder
from moe_lvlm.training.log import RunLog
from moe_lvlm.training.plan import StagePlan, check_data, plan_stages
from moe_lvlm.training.stage import Run, Stage
from moe_lvlm.training.state import TrainState
from moe_lvlm.training.watchdog import Watchdog


def train(
    recipe: Recipe, *, resume: bool = True, stop_signal: signal.Signals | None = None, until: str | None = None
) -> Path:
    """Train a recipe's stages; every process of the launcher calls it. Returns the run's folder.

    resume: go on from the newest valid checkpoint of the run's folder, if there is one; False begins anew and removes
    what the run in the folder wrote. After SIGINT, SIGTERM or `stop_signal` (SIGUSR1 or SIGUSR2) the run saves at the
    next step and returns without the DONE mark; the same call goes on from there. until: a stage's name; return when it
    is done.

    Raises:
        ValueError: a recipe that does not fit the processes or the folder, a folder in which another run trains, no
            such stage, another stop signal.
    """
    num_stages = len(recipe.stages) if until is None else recipe.stage_index(until) + 1
    job = batch_job()
    with Interrupt(stop_signal) as interrupt, ExitStack() as held:
        watchdog = held.enter_context(Watchdog(run_folder(recipe), limit=recipe.train.hang_timeout))
        world = join_world(timeout=group_timeout(recipe.train.hang_timeout))
        hosts = watchdog.meet(current_ranks())
        processor = run_processor(recipe)
        folder = run_folder(recipe)
        plans, problem = _on_first(world, lambda: _prepare(recipe, processor, resume=resume, world=world, held=held))
        watchdog.beat("start")
        log = RunLog(folder, is_enabled=world.is_first)
        held.callback(log.close)
        watchdog.log_to(log.event)
        if problem is not None:
            log.say(problem)
        if world.is_first:
            processor.save_pretrained(folder / PROCESSOR)
            resolved = {plan.settings.name: plan.deepspeed for plan in plans}
            write_facts(folder, deepspeed=resolved, world_size=world.size)
        log.event("world", world_size=world.size, hosts=hosts, **job)
        run = Run(
            recipe=recipe,
            folder=folder,
            world=world,
            processor=processor,
            log=log,
            interrupt=interrupt,
            watchdog=watchdog,
            writer=_open_writer(recipe, log),
        )
        _train_stages(run, num_stages)
    return folder


def _prepare(
    recipe: Recipe, processor: Processor, *, resume: bool, world: World, held: ExitStack
) -> tuple[list[StagePlan], str | None]:
    """Find every mistake that can be found now; only then touch the folder. Its lock is held until `held` closes.

    Returns the plans, and why the folder could not be locked, if so.
    """
    plans = plan_stages(recipe, world_size=world.size)
    check_data(recipe, processor)
    problem = held.enter_context(lock_folder(run_folder(recipe)))
    prepare_folder(recipe, resume=resume)
    return plans, problem


def _open_writer(recipe: Recipe, log: RunLog) -> CheckpointWriter:
    settings = recipe.train.checkpoint
    return CheckpointWriter(
        ranks=current_ranks(),
        background_ranks=GroupRanks(dist.new_group(backend="gloo")) if settings.background else None,
        max_bytes=int(settings.background_gib * 2**30),
        log=log.say,
    )


def _train_stages(run: Run, num_stages: int) -> None:
    """Train the first `num_stages` stages of the recipe, those that are not done."""
    started = time.monotonic()
    names = [stage.name for stage in run.recipe.stages]
    state, checkpoint = _where_it_stopped(run)
    _mark_stages(run, state.stage)
    already = " already" if state.stage >= num_stages else ""
    while state.stage < num_stages:
        stage = Stage(run, state, checkpoint)
        is_complete = stage.run()
        checkpoint = run.folder / CHECKPOINTS / f"{names[state.stage]}-{stage.state.step:06d}"
        if is_complete:
            state = stage.state.next_stage()
            _mark_stages(run, state.stage)
        stage.close()
        # A stop is not put off by the minutes that the next stage's model may take.
        if not is_complete or (state.stage < num_stages and _is_stop_requested(run)):
            run.log.event("stopped", path=str(checkpoint))
            run.log.say(f"stopped; saved in {checkpoint}. The same command goes on from there.")
            return
        del stage
        gc.collect()
    if state.stage < len(names):
        run.log.say(f"stage {names[num_stages - 1]} is done{already}; without --until, {names[state.stage]} comes next")
        return
    if run.world.is_first and not (run.folder / DONE).exists():
        run.log.event("done", seconds=time.monotonic() - started)
        (run.folder / DONE).touch()
    run.log.say(f"done: {run.folder}")


def _mark_stages(run: Run, num_done: int) -> None:
    names = [stage.name for stage in run.recipe.stages]
    _on_first(run.world, lambda: mark_stages(run.folder, names, num_done=num_done))


def _is_stop_requested(run: Run) -> bool:
    """Whether any rank was asked to stop, on all ranks."""
    return any(current_ranks().all_gather(run.interrupt.is_requested))


def _where_it_stopped(run: Run) -> tuple[TrainState, Path | None]:
    """State and checkpoint to go on from; the first state and None for a new run."""
    newest = _on_first(run.world, lambda: newest_valid(run.folder / CHECKPOINTS, run.log.say, is_owner=True))
    if newest is None:
        return TrainState(), None
    state = TrainState.from_json(read_json(newest / STATE_FILE))
    run.log.event("resume", path=str(newest), global_step=state.global_step)
    run.log.say(f"going on from {newest}")
    # The last checkpoint of a stage is where the next one begins.
    return (state.next_stage() if state.is_stage_done else state), newest


def _on_first(world: World, work: Any) -> Any:
    """What `work` gives on rank 0, on all ranks; its ValueError or OSError on all ranks too."""
    outcome: list[Any] = [None, None]
    if world.is_first:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
