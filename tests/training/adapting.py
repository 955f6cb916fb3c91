"""What ranks do in the tests of the adaptation of experts, and a small problem in which all kinds of it happen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from moe_lvlm.checkpoint.engine import live_engine
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.data.collator import Batch
from moe_lvlm.data.loader import MicroBatch
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.parallel.process_group import join_world
from moe_lvlm.routing.dynamic import DynamicRouter
from moe_lvlm.training.adaptation import ExpertAdaptation
from moe_lvlm.training.step import count_step, run_step
from moe_lvlm.training.trainable import select_trainable
from tests.parallel.jobs import start_training
from tests.parallel.problems import Problem, batches
from tests.tiny_models import tiny_moe_llava

STEPS, ADAPT_EVERY, NUM_EXPERTS = 3, 2, 4
# No cosine is above 1 and none below -1
NOBODY, EVERYBODY = 2.0, -2.0
# Of each layer: thresholds, the number of active experts at the start, and what must happen in it
LAYERS: tuple[tuple[tuple[float, ...], int], ...] = (
    ((0.05, 0.05, 0.05, 0.0), 3),  # some tokens have none: 3 is added
    ((EVERYBODY, EVERYBODY, NOBODY, NOBODY), 3),  # 2 is dropped and nothing added
    ((0.05, NOBODY, 0.05, 0.05), 4),  # 1 is dropped, and its slot used again
)
EXPECTED = {
    "0": {"active": 4, "added": [3], "removed": []},
    "1": {"active": 2, "added": [], "removed": [2]},
    "2": {"active": 4, "added": [1], "removed": []},
}


@dataclass(frozen=True)
class Case:
    """A topology."""

    world: int
    zero: int
    expert_parallel_size: int = 1
    precision: str = "fp32"
    has_checkpointing: bool = False


def build() -> MoELlavaForConditionalGeneration:
    """The whole model in float32, in training mode."""
    config = MoEConfig.model_validate(
        {
            "layers": "dense",
            "num_experts": NUM_EXPERTS,
            "top_k": 1,
            "router": {"kind": "dynamic", "adapt_every": ADAPT_EVERY, "coefficient": 0.1},
            "balance": {"on": ["language"], "coefficient": 0.1},
        }
    )
    torch.manual_seed(0)
    model = tiny_moe_llava(config)
    for (_, layer), (thresholds, num_active) in zip(moe_layers(model), LAYERS, strict=True):
        assert isinstance(layer.router, DynamicRouter)
        layer.router.gate.threshold.data.copy_(torch.tensor(thresholds))
        layer.router.is_active_E.copy_(torch.arange(NUM_EXPERTS) < num_active)
    select_trainable(model, ("moe",))
    return model.train()


def micro_batches(step: int) -> list[Batch]:
    """All of a step; rank r of w takes numbers r, r + w, ..."""
    return batches(Problem(), step)


def adapt(case: Case) -> dict[str, Any]:
    """Train and adapt. Of each step what was reported; after the adaptation and at the end what this rank holds."""
    world = join_world()
    engine = start_training(
        build(),
        world,
        num_micro_batches=len(micro_batches(0)),
        zero=case.zero,
        expert_parallel_size=case.expert_parallel_size,
        precision=case.precision,
        has_checkpointing=case.has_checkpointing,
        persistence_threshold=200,
    )
    adaptation = ExpertAdaptation(engine.module, is_new_stage=True)
    reports, adapted = [], {}
    for step in range(STEPS):
        every = micro_batches(step)
        mine = [MicroBatch(batch, (), 1) for batch in every[world.rank :: world.size]]
        divisor = count_step(mine, is_stopping=False, device=world.device).supervised / len(every)
        run_step(engine, mine, divisor=divisor, device=world.device, counter=None, adaptation=adaptation)
        reports.append(adaptation.finish_step(step + 1, lambda: live_engine(engine), has_skipped=False))
        if step + 1 == ADAPT_EVERY:
            adapted = {"fragments": _fragments(engine), "weights": _weights(engine)}
    result = {"reports": reports, "adapted": adapted, "fragments": _fragments(engine), "weights": _weights(engine)}
    dist.barrier()
    dist.destroy_process_group()
    return result


def _fragments(engine: Any) -> list[tuple[str, str, list[int], int, torch.Tensor]]:
    return [
        (one.name, one.kind, list(one.shape), one.start, one.tensor.clone())
        for one in live_engine(engine).fragments()
        if ".mlp." in one.name
    ]


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    named = [(name, p) for name, p in engine.module.named_parameters() if ".mlp." in name and p.requires_grad]
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=engine.zero_optimization_stage() == 3):
        return {name: parameter.detach().clone() for name, parameter in named}
