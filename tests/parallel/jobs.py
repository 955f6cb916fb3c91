"""What ranks do in the tests of this room: train a problem in a DeepSpeed engine, the way a stage of a run does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from moe_lvlm.cli import main
from moe_lvlm.config.recipe import OptimizerSettings
from moe_lvlm.data.loader import MicroBatch
from moe_lvlm.models.build import VLM
from moe_lvlm.parallel.engine import start_engine
from moe_lvlm.parallel.expert_parallel import bind_expert_parallel
from moe_lvlm.parallel.process_group import World, join_world
from moe_lvlm.training.optimizer import parameter_groups
from moe_lvlm.training.step import count_step, run_step
from tests.parallel.problems import CLIP, EPS, LEARNING_RATE, WEIGHT_DECAY, Problem, batches, build


@dataclass(frozen=True)
class Case:
    """A problem on a topology."""

    problem: Problem
    world: int
    zero: int
    expert_parallel_size: int
    precision: str = "fp32"
    has_checkpointing: bool = False


def train(case: Case) -> dict[str, Any]:
    """`Outcome`'s fields; of experts' parameters this rank's share."""
    world = join_world()
    engine = _start(case, world)
    return run_steps(engine, world, [batches(case.problem, step) for step in range(case.problem.num_steps)])


def run_steps(engine: Any, world: World, steps: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Train on the micro-batches of each step, each rank on its own, and leave the group. `Outcome`'s fields."""
    losses, norms = [], []
    for every in steps:
        losses.append(_step(engine, every, world))
        norms.append(float(engine.get_global_grad_norm()))
    result = {"losses": losses, "norms": norms, "parameters": _parameters(engine)}
    dist.barrier()
    dist.destroy_process_group()
    return result


def _start(case: Case, world: World) -> Any:
    return start_training(
        build(case.problem),
        world,
        num_micro_batches=len(case.problem.steps[0]),
        zero=case.zero,
        expert_parallel_size=case.expert_parallel_size,
        precision=case.precision,
        has_checkpointing=case.has_checkpointing,
    )


def start_training(
    model: VLM,
    world: World,
    *,
    num_micro_batches: int,
    zero: int,
    expert_parallel_size: int,
    precision: str,
    has_checkpointing: bool,
    persistence_threshold: int = 0,
) -> Any:
    """An engine that trains a built model, in training mode.

    num_micro_batches: of a step, over all ranks. persistence_threshold: parameters below it are not partitioned at ZeRO
    3; 0 partitions the smallest too.
    """
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    bind_expert_parallel(model, expert_parallel_size, zero_stage=zero)
    if has_checkpointing:
        for module in model.checkpointed_modules():
            module.gradient_checkpointing_enable({"use_reentrant": False})
    settings = OptimizerSettings(eps=EPS, weight_decay=WEIGHT_DECAY)
    engine = start_engine(
        model,
        parameter_groups(model, learning_rate=LEARNING_RATE, settings=settings),
        optimizer_options={"lr": LEARNING_RATE, "betas": settings.betas, "eps": settings.eps},
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": num_micro_batches // world.size,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": zero}
            | ({"stage3_param_persistence_threshold": persistence_threshold} if zero == 3 else {}),
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    engine.train()
    return engine


def _step(engine: Any, every: Sequence[Any], world: World) -> float:
    """The step's loss over all ranks. every: micro-batches of all ranks."""
    mine = [MicroBatch(batch, (), 1) for batch in every[world.rank :: world.size]]
    counts = count_step(mine, is_stopping=False, device=world.device)
    losses = run_step(engine, mine, divisor=counts.supervised / len(every), device=world.device, counter=None)
    total = losses.language.double() + (0 if losses.balance is None else losses.balance)
    dist.all_reduce(total)
    return float(total) / len(every)


def _parameters(engine: Any) -> dict[str, torch.Tensor]:
    named = list(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=engine.zero_optimization_stage() == 3):
        return {name: parameter.detach().clone() for name, parameter in named}


def refusal(problem: Problem, expert_parallel_size: int) -> str:
    """The ValueError of binding a model at this size."""
    join_world()
    try:
        bind_expert_parallel(build(problem), expert_parallel_size, zero_stage=2)
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    raise AssertionError("nothing was refused")


def command(*arguments: str) -> int:
    """The command line's exit status."""
    try:
        return main(arguments)
    finally:
        dist.destroy_process_group()


def rank_and_pid() -> tuple[int, int]:
    """Who this process is."""
    return int(os.environ["RANK"]), os.getpid()


def fail_on_second_rank() -> None:
    """Leave the other ranks alone in a collective."""
    world = join_world()
    if world.rank == 1:
        raise RuntimeError("on purpose")
    dist.barrier()


def hang() -> None:
    """Never return."""
    time.sleep(3600)
