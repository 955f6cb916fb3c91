"""LoRA experts in training: on ranks that share a batch, and in a plain loop that has it whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.data.collator import Batch
from moe_lvlm.models.adapt import adapt
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.parallel.process_group import join_world
from moe_lvlm.training.trainable import select_trainable
from tests.parallel.jobs import run_steps, start_training
from tests.parallel.plain_loop import groups, step_loss
from tests.parallel.problems import CLIP, EPS, LEARNING_RATE, Outcome, Problem, batches
from tests.tiny_models import tiny_llava

NUM_STEPS = 3
NUM_CLUSTERS, WIDTH = 3, 6  # as many clusters as `problems` gives its samples


@dataclass(frozen=True)
class Case:
    """gating, has_universal, targets: of the adapters. layout: of the batches, see `problems.LAYOUTS`."""

    gating: str = "cluster"
    has_universal: bool = True
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    layout: str = "mixed"
    world: int = 2
    zero: int = 2
    precision: str = "fp32"
    has_checkpointing: bool = False
    persistence_threshold: int = 0


def build(case: Case) -> MoELlavaForConditionalGeneration:
    """Adapters and projector in training, tower and language model frozen; noise as in the paper."""
    settings = MoCLESettings.model_validate(
        {
            "target_modules": case.targets,
            "rank": 2,
            "alpha": 8.0,
            "num_experts": 3,
            "has_universal": case.has_universal,
            "top_k": 1 if case.has_universal else 2,
            "gating": case.gating,
            "num_clusters": NUM_CLUSTERS,
            "embedding_width": WIDTH,
            "temperature": 0.2,
        }
    )
    model = as_moe_llava(tiny_llava("llama"))
    adapt(model, settings, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):  # 0 at the start, from where A and the gates would not move in the first step
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    select_trainable(model, ("adapter", "connector"))
    return model.train()


def micro_batches(case: Case, step: int) -> list[Batch]:
    """All of a step, each sample with a draw and a dataset."""
    made = batches(Problem(layout=case.layout), step)
    for number, batch in enumerate(made):
        count = batch["routing"].num_samples
        assert count is not None
        draw_N = 100 * step + 10 * number + torch.arange(count)
        batch["routing"] = replace(batch["routing"], draw_N=draw_N, dataset_N=draw_N % NUM_CLUSTERS)
    return made


def train(case: Case) -> dict[str, Any]:
    """`Outcome`'s fields."""
    world = join_world()
    steps = [micro_batches(case, step) for step in range(NUM_STEPS)]
    engine = start_training(
        build(case),
        world,
        num_micro_batches=len(steps[0]),
        zero=case.zero,
        expert_parallel_size=1,
        precision=case.precision,
        has_checkpointing=case.has_checkpointing,
        persistence_threshold=case.persistence_threshold,
    )
    return run_steps(engine, world, steps)


@cache
def solve(case: Case) -> Outcome:
    """The same by a plain loop on one process, without DeepSpeed and without any group."""
    model = build(case)
    optimizer = torch.optim.AdamW(groups(model), lr=LEARNING_RATE, eps=EPS)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        losses.append(step_loss(model, micro_batches(case, step)))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return Outcome(losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()})
