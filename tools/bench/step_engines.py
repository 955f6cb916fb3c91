"""The engines that steps are timed on: a stage's model as it is, as the dense floor, or with another stack's FFNs."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bench.measure import watch_saved
from bench.rivals import UnavailableError
from bench.step_rivals import put_in, rival_layers
from moe_lvlm.config.deepspeed import resolve_deepspeed
from moe_lvlm.config.moe import MoEConfig, TopKRouterSettings
from moe_lvlm.config.recipe import Recipe, StageSettings
from moe_lvlm.connectors.connector import QFormerConnector
from moe_lvlm.data.loader import MicroBatch
from moe_lvlm.models.build import VLM
from moe_lvlm.models.connectors import connector_loss
from moe_lvlm.models.images import blank_image
from moe_lvlm.models.instructblip_config import VLMConfig
from moe_lvlm.models.language_loss import language_loss, sum_losses
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.packed_attention import attend_within_samples, check_family
from moe_lvlm.models.tower import is_frozen, tower_features
from moe_lvlm.parallel.engine import start_engine
from moe_lvlm.parallel.process_group import World
from moe_lvlm.routing.losses import auxiliary_loss
from moe_lvlm.training.build import build_stage_model, is_sparse_at, stage_config
from moe_lvlm.training.checkpointing import enable_checkpointing
from moe_lvlm.training.optimizer import parameter_groups

Kind = Literal["dense", "ours", "masked", "transformers_eager", "transformers_grouped_mm", "moe_llava"]

# Parts that only a sparse model has, which the floor trains as the FFNs that they came from; and those without any.
_EXPERT_PARTS, _ROUTER_PARTS = ("moe", "experts"), ("router",)
_RELEASED = ("moe", "dense_ffn", "connector")


class HeldEngine:
    """An engine in training, built as the trainer builds it. kind: of its model.

    The learning rate is 0, so that every step is the same work on the same weights. takes_packed: whether packed batches
    will come.

    Raises:
        UnavailableError: layers that another stack does not have.
        ValueError: what the trainer refuses of the recipe.
    """

    def __init__(self, recipe: Recipe, stage: int, kind: Kind, world: World, *, takes_packed: bool) -> None:
        self._recipe = recipe_of(recipe, stage, kind)
        self._stage, self._kind, self._world, self._takes_packed = stage, kind, world, takes_packed
        self.engine = self._start()

    @property
    def model(self) -> VLM:
        model: VLM = self.engine.module
        return model

    def stop(self) -> None:
        """Give its memory back."""
        self.engine.destroy()
        self.engine = None
        gc.collect()
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()

    def renew(self) -> None:
        """The same from the beginning, where a step has failed in the middle."""
        self.stop()
        self.engine = self._start()

    def _start(self) -> Any:
        recipe, world = self._recipe, self._world
        deepspeed = resolve_deepspeed(recipe, recipe.stages[self._stage], world.size)
        zero_stage = int(deepspeed["zero_optimization"].get("stage", 0))
        # random weights are drawn where they are needed: billions of them take minutes on a CPU
        is_drawn_there = world.device.type == "cuda" and _is_random(recipe)
        with world.device if is_drawn_there else nullcontext():
            model = build_stage_model(recipe, self._stage, None, zero_stage=zero_stage, device=world.device)
        if self._kind not in ("dense", "ours"):
            put_in(model, self._kind)
        if self._takes_packed:
            attend_within_samples(model.get_decoder())
        optimizer = recipe.train.optimizer
        engine = start_engine(
            model,
            parameter_groups(model, learning_rate=0.0, settings=optimizer),
            optimizer_options={"lr": 0.0, "betas": optimizer.betas, "eps": optimizer.eps},
            config=deepspeed,
        )
        engine.train()
        return engine


def starts_as_dense(moe: MoEConfig) -> bool:
    """Whether an upcycled model computes what the dense one did: equal experts whose weights sum up to 1."""
    return (
        moe.router.kind != "dynamic"
        and moe.router.renormalize
        and not moe.shared_experts
        and moe.fine_grained == 1
        and moe.capacity_factor is None
    )


def recipe_of(recipe: Recipe, stage: int, kind: Kind) -> Recipe:
    """The recipe whose stage an engine of this kind trains.

    The dense floor is the same stage's model not upcycled, the FFNs trained that would be experts. Other stacks route by
    plain top-k, which is all that they have.

    Raises:
        ValueError: a stage of which nothing would be trained in the dense model.
    """
    if kind == "ours" or not is_sparse_at(recipe, stage):
        return recipe
    if kind == "masked":
        return recipe
    if kind != "dense":
        moe = recipe.moe.model_copy(update={"router": TopKRouterSettings(), "capacity_factor": None})
        return recipe.model_copy(update={"moe": moe})
    sparse = stage_config(recipe, stage)
    indices = recipe.moe.layer_indices(sparse.text_config.num_hidden_layers)
    parts = dense_parts(recipe.stages[stage].train, indices)
    if not parts:
        raise ValueError(
            f"stage {recipe.stages[stage].name}: trains {', '.join(recipe.stages[stage].train)}, of which the dense model "
            "has nothing; allowed: a stage that trains experts, or parts of the dense model"
        )
    stages = [one.model_copy(update={"upcycle": False}) for one in recipe.stages]
    stages[stage] = stages[stage].model_copy(update={"train": parts})
    return recipe.model_copy(update={"stages": tuple(stages)})


def dense_parts(parts: Sequence[str], sparse: Sequence[int]) -> tuple[str, ...]:
    """What the dense model trains in the place of `train`. sparse: indices of the layers that would hold experts."""
    ffns = r"re:^model\.language_model\.layers\.({})\.mlp\."
    chosen = "|".join(map(str, sparse))
    found: list[str] = []
    for part in (name for one in parts for name in (_RELEASED if one == "released" else (one,))):
        if part in _EXPERT_PARTS:
            found.append(ffns.format(chosen))
        elif part == "dense_ffn":
            found.append(ffns.format(rf"(?!(?:{chosen})\.)\d+"))
        elif part not in _ROUTER_PARTS:
            found.append(part)
    return tuple(dict.fromkeys(found))


def can_pack(config: VLMConfig) -> str | None:
    """Why batches of this model cannot be packed; None where they can."""
    if config.is_answer_apart:
        return "answers stand apart (encoder-decoder)"
    try:
        check_family(config.text_config)
    except ValueError as error:
        return str(error)
    return None


def _is_random(recipe: Recipe) -> bool:
    parts = (recipe.model.vision_tower, recipe.model.language_model)
    return all(part is not None and part.from_pretrained is None for part in parts)


def divisor_of(settings: StageSettings, supervised: int) -> float:
    """What the trainer divides a micro-batch's summed losses by (loss_average: step). supervised: tokens of the step."""
    return max(supervised, 1) / (settings.global_batch // settings.micro_batch)


def set_checkpointing(model: VLM, setting: bool | int) -> None:
    """Let a model recompute as `train.gradient_checkpointing` says, whatever it did before."""
    for module in model.checkpointed_modules():
        module.gradient_checkpointing_disable()
    enable_checkpointing(model, setting)


@torch.no_grad()
def with_features(model: VLM, micro_batches: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """The same micro-batches with what the model's tower makes of their images in the place of these, on the host and in
    the tower's type, as a feature cache gives them.

    Raises:
        UnavailableError: a tower that is trained, or a model that takes no features.
    """
    if not isinstance(model, MoELlavaForConditionalGeneration):
        raise UnavailableError("LLaVA only")
    tower, config = model.model.vision_tower, model.config
    if not is_frozen(tower):
        raise UnavailableError("the stage trains the tower")
    dtype = next(tower.parameters()).dtype
    blank = blank_image(config.vision_config, like=torch.zeros((), dtype=dtype, device=device))
    found = []
    for one in micro_batches:
        batch: Any = dict(one.batch)
        pixels = batch.pop("pixel_values", None)
        features = tower_features(
            tower,
            blank if pixels is None else pixels.to(device, dtype),
            layer=config.vision_feature_layer,
            select=config.vision_feature_select_strategy,
        )
        batch["image_features"] = features[: 0 if pixels is None else None].cpu()
        found.append(replace(one, batch=batch))
    return found


class AllLogits:
    """An engine whose language head runs on every position, the loss as transformers computes it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *, labels: Tensor, num_items_in_batch: Tensor | None, output_routing: bool, **batch: Any) -> Any:
        model: VLM = self._engine.module
        output = self._engine(**batch, output_routing=True)
        language = language_loss(
            output.logits, labels, vocab_size=model.config.text_config.vocab_size, num_items_in_batch=num_items_in_batch
        )
        losses = sum_losses(language, _auxiliary(model, output))
        output.loss, output.language_loss, output.balance_loss = losses.total, losses.language, losses.balance
        if not output_routing:
            output.routing = None
        return output


def _auxiliary(model: VLM, output: Any) -> Tensor | None:
    """Balance losses, each times its coefficient: from the trace, and what other stacks' layers computed themselves."""
    moe = model.config.moe_config
    losses: list[Tensor | None] = []
    if output.routing is not None and moe is not None:
        losses.append(auxiliary_loss(output.routing, moe))
    connector = getattr(model.model, "connector", None)
    if isinstance(connector, QFormerConnector) and output.routing is not None:
        losses.append(connector_loss(output.routing, connector.qformer))
    if moe is not None:
        losses += [
            None if layer.auxiliary is None else moe.balance.coefficient * layer.auxiliary
            for layer in rival_layers(model)
        ]
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).sum() if found else None


class Watched:
    """An engine that looks at what its forward passes keep, and leave out.

    saved_mib: the most that autograd kept of one micro-batch, parameters left out. dropped: (token, expert) assignments
    of another stack's layers that were left out.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.saved_mib = 0.0
        self.dropped = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, **batch: Any) -> Any:
        output, saved_mib = watch_saved(lambda: self._engine(**batch), self._engine.module)
        self.saved_mib = max(self.saved_mib, saved_mib)
        dropped = [layer.dropped for layer in rival_layers(self._engine.module)]
        self.dropped += sum(int(one) for one in dropped if one is not None)
        return output
