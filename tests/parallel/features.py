"""The problems of this room with features in the place of images, as a feature cache gives them."""

from __future__ import annotations

from typing import Any

import torch

from moe_lvlm.data.collator import Batch
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.tower import tower_features
from moe_lvlm.parallel.process_group import join_world
from tests.parallel.jobs import Case, run_steps, start_training
from tests.parallel.problems import batches, build
from tests.tiny_models import IMAGE_TOKENS


def train_from_features(case: Case) -> dict[str, Any]:
    """`Outcome`'s fields, of a training that never calls the tower."""
    world = join_world()
    model = build(case.problem)
    steps = [
        [with_features(model, batch) for batch in batches(case.problem, step)] for step in range(case.problem.num_steps)
    ]
    model.model.vision_tower.register_forward_pre_hook(_refuse)
    engine = start_training(
        model,
        world,
        num_micro_batches=len(case.problem.steps[0]),
        zero=case.zero,
        expert_parallel_size=case.expert_parallel_size,
        precision=case.precision,
        has_checkpointing=case.has_checkpointing,
    )
    return run_steps(engine, world, steps)


@torch.no_grad()
def with_features(model: MoELlavaForConditionalGeneration, batch: Batch) -> dict[str, Any]:
    """The same batch with what the tower makes of its images; of none, [0, M, C]."""
    tower, config = model.model.vision_tower, model.config
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    if "pixel_values" not in batch:
        return rest | {"image_features": torch.empty(0, IMAGE_TOKENS, config.vision_config.hidden_size)}
    features = tower_features(
        tower,
        batch["pixel_values"],
        layer=config.vision_feature_layer,
        select=config.vision_feature_select_strategy,
    )
    return rest | {"image_features": features.clone()}


def _refuse(*args: Any) -> None:
    raise AssertionError("the tower was called")
