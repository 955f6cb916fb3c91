"""What processes of the training tests do besides `moe-lvlm train`."""

from __future__ import annotations

import json
import os
import signal
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
