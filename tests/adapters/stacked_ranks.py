"""Adapters on experts' stacks in training: on ranks that share the experts, and in a plain loop that has them all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_lvlm.adapters import attach
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.parallel.process_group import join_world
from moe_lvlm.training.trainable import select_trainable
from tests.adapters.problems import shake_adapters
from tests.parallel import problems
from tests.parallel.jobs import run_steps, start_training
from tests.parallel.plain_loop import groups, step_loss
from tests.parallel.problems import CLIP, EPS, LEARNING_RATE, Outcome, Problem, batches

STACKS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Case:
    """kind: lora, or a gating. layout: of tests.parallel. train: parts of the model."""

    kind: str = "cluster"
    layout: str = "mixed"
    train: tuple[str, ...] = ("adapter",)
    world: int = 2
    zero: int = 2
    expert_parallel_size: int = 2
    is_starved: bool = False
    has_checkpointing: bool = False

    @property
    def problem(self) -> Problem:
        return Problem(layout=self.layout, is_starved=self.is_starved)

    @property
    def settings(self) -> LoRASettings:
        low_rank: dict[str, Any] = {"rank": 2, "alpha": 3.0, "target_modules": ("q_proj", *STACKS)}
        if self.kind == "lora":
            return LoRASettings(**low_rank)
        gate: dict[str, Any] = {
            "num_experts": 3,
            "num_clusters": 3,
            "embedding_width": 6,
            "temperature": 0.7,
            "noise": 0,
        }
        return MoCLESettings(gating=self.kind, **low_rank, **gate)


def build(case: Case) -> MoELlavaForConditionalGeneration:
    """A sparse model with adapters that do something, in training mode."""
    model = problems.build(case.problem)
    attach(model.model.language_model, case.settings)
    shake_adapters(model)
    model.config.adapter = case.settings.model_dump(mode="json")
    select_trainable(model, case.train)
    return model.train()


def train(case: Case) -> dict[str, Any]:
    """`Outcome`'s fields; of what is spread over ranks this rank's share."""
    world = join_world()
    engine = start_training(
        build(case),
        world,
        num_micro_batches=len(case.problem.steps[0]),
        zero=case.zero,
        expert_parallel_size=case.expert_parallel_size,
        precision="fp32",
        has_checkpointing=case.has_checkpointing,
    )
    return run_steps(engine, world, [batches(case.problem, step) for step in range(case.problem.num_steps)])


@cache
def solve(case: Case) -> Outcome:
    """Losses, norms and parameters on one process, without DeepSpeed."""
    model = build(case)
    optimizer = torch.optim.AdamW(groups(model), lr=LEARNING_RATE, eps=EPS)
    losses, norms = [], []
    for step in range(case.problem.num_steps):
        optimizer.zero_grad()
        losses.append(step_loss(model, batches(case.problem, step)))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return Outcome(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})
