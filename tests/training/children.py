"""What processes of the training tests do besides `moe-lvlm train`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moe_lvlm
from moe_lvlm import cli
from moe_lvlm.config.recipe import Recipe


def train_and_die(number: str, *command: str) -> None:
    """`moe-lvlm` that kills all processes of the run at the first one's `number`-th fsync, before it is done."""
    left = int(number) if os.environ["RANK"] == "0" else -1
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.killpg(os.getpgid(0), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted  # type: ignore[assignment]
    raise SystemExit(cli.main(list(command)))


def train_and_stop(how: str, rank: str, number: str, *command: str) -> None:
    """`moe-lvlm` in which one rank stops at its `number`-th fsync, or before it does anything (0).

    how: `process`, as by SIGSTOP, or `thread`, the one that writes.
    """
    left = int(number) if os.environ["RANK"] == rank else -1
    fsync = os.fsync

    def sync_to_a_dead_disk(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0 and how == "thread":
            time.sleep(1000)
        elif left == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        fsync(descriptor)

    if left == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    os.fsync = sync_to_a_dead_disk  # type: ignore[assignment]
    raise SystemExit(cli.main(list(command)))


def train_with_sleeps(rank: str, number: str, seconds: str, *command: str) -> None:
    """`moe-lvlm` in which reading a sample takes so many seconds longer, on one rank or `any`, from the `number`-th
    that a process reads."""
    from moe_lvlm.data.mixture import Draw, MixtureDataset
    from moe_lvlm.data.sample import Sample

    left = int(number)
    read = MixtureDataset.__getitem__

    def read_from_a_slow_disk(dataset: MixtureDataset, draw: Draw) -> Sample:
        nonlocal left
        left -= 1
        if left < 0:
            time.sleep(float(seconds))
        return read(dataset, draw)

    if rank in ("any", os.environ["RANK"]):
        MixtureDataset.__getitem__ = read_from_a_slow_disk  # type: ignore[method-assign]
    raise SystemExit(cli.main(list(command)))


def train_and_hold_the_lock(*command: str) -> None:
    """`moe-lvlm` that sleeps in C code with Python's lock at its first read, watched by a less patient last resort."""
    import ctypes

    from moe_lvlm.data.mixture import Draw, MixtureDataset
    from moe_lvlm.data.sample import Sample
    from moe_lvlm.training import watchdog

    def read_with_the_lock(dataset: MixtureDataset, draw: Draw) -> Sample:
        ctypes.PyDLL(None).sleep(1000)
        raise AssertionError("it was to sleep for longer")

    watchdog._LAST_RESORT = 1.0
    MixtureDataset.__getitem__ = read_with_the_lock  # type: ignore[method-assign]
    raise SystemExit(cli.main(list(command)))


def train_and_ask_between(*command: str) -> None:
    """`moe-lvlm` of which rank 0 is asked to stop when the first stage has been saved."""
    from moe_lvlm.training.stage import Stage

    close = Stage.close

    def asked(stage: Stage) -> None:
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        close(stage)

    Stage.close = asked  # type: ignore[method-assign, assignment]
    raise SystemExit(cli.main(list(command)))


def wait_in_a_new_group() -> None:
    """Of two ranks the first waits in vain, in a group made without a timeout, after all have been given a short one."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from moe_lvlm.parallel.process_group import join_world, set_group_timeouts

    world = join_world()
    group = dist.new_group([0, 1])
    dist.barrier(group)
    set_group_timeouts(timedelta(milliseconds=250))
    if world.is_first:
        try:
            dist.all_reduce(torch.zeros(1), group=group)
        except RuntimeError as error:
            print(error)
    else:
        time.sleep(3)


def train_several(*recipes: str) -> None:
    """Train one recipe after the other in this process, through the Python API."""
    for path in recipes:
        print(moe_lvlm.train(moe_lvlm.load_recipe(path)))


def train_topologies(recipe: str, plan: str) -> None:
    """Train a recipe under one topology after the other. plan: JSON file, a list of {"overrides"}."""
    for _, settings in _topologies(recipe, plan):
        print(moe_lvlm.train(settings))


def continue_topologies(recipe: str, plan: str) -> None:
    """Go on from checkpoints of runs under other topologies, to the end of the stage, one after the other.

    What is restored is saved as `restored` in the run's folder, before the first step.
    plan: JSON file, a list of {"overrides", "checkpoint"}.
    """
    from moe_lvlm.checkpoint.background import CheckpointWriter
    from moe_lvlm.checkpoint.layout import STATE_FILE, read_json
    from moe_lvlm.checkpoint.ranks import current_ranks
    from moe_lvlm.parallel.process_group import join_world
    from moe_lvlm.training.build import run_processor
    from moe_lvlm.training.interrupt import Interrupt
    from moe_lvlm.training.log import RunLog
    from moe_lvlm.training.stage import Run, Stage
    from moe_lvlm.training.state import TrainState
    from moe_lvlm.training.watchdog import Watchdog

    world = join_world()
    for item, settings in _topologies(recipe, plan):
        folder, checkpoint = Path(str(settings.output_dir)), Path(item["checkpoint"])
        folder.mkdir(parents=True, exist_ok=True)
        log = RunLog(folder, is_enabled=world.is_first)
        writer = CheckpointWriter(ranks=current_ranks(), background_ranks=None, max_bytes=0, log=log.say)
        run = Run(
            recipe=settings,
            folder=folder,
            world=world,
            processor=run_processor(settings),
            log=log,
            interrupt=Interrupt(),
            watchdog=Watchdog(folder, limit=0),
            writer=writer,
        )
        stage = Stage(run, TrainState.from_json(read_json(checkpoint / STATE_FILE)), checkpoint)
        _save_restored(stage, folder)
        assert stage.run()
        stage.close()
        log.close()


def _topologies(recipe: str, plan: str) -> Iterator[tuple[dict[str, Any], Recipe]]:
    """The plan's items, and the recipe with the overrides of each."""
    from deepspeed.utils import groups

    for item in json.loads(Path(plan).read_text()):
        # DeepSpeed allows one expert-parallel size a process; the topologies follow each other in one
        groups._EXPERT_PARALLEL_GROUP = {}
        groups._EXPERT_DATA_PARALLEL_GROUP = {}
        yield item, moe_lvlm.load_recipe(recipe, item["overrides"])


def _save_restored(stage: Any, folder: Path) -> None:
    from moe_lvlm.checkpoint.engine import live_engine
    from moe_lvlm.checkpoint.ranks import current_ranks
    from moe_lvlm.checkpoint.save import save_checkpoint

    save_checkpoint(
        folder,
        "restored",
        live_engine(stage._engine),
        config=json.loads(stage._engine.module.config.to_json_string()),
        state=stage.state.to_json(),
        rng={},
        ranks=current_ranks(),
        log=print,
    )
