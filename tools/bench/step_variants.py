"""The list of steps that are compared, and what each means for a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from bench.rivals import UnavailableError
from bench.step_engines import Kind, can_pack
from bench.variants import DENSE, choose_among
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.models.instructblip_config import VLMConfig
from moe_lvlm.training.build import is_sparse_at, stage_config

OURS = "ours"
HALF = "half"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepVariant:
    """One row of the comparison; what is None is as the recipe says.

    kind: of the engine. is_packed: how batches are made. checkpointed: `train.gradient_checkpointing`, or half of the
    decoder layers. has_all_logits: the language head on every position. is_cached: the tower's features are there.
    is_same: whether it computes what `ours` does, so that losses and gradients must agree.
    """

    name: str
    label: str
    kind: Kind = "ours"
    is_packed: bool | None = None
    checkpointed: bool | str | None = None
    has_all_logits: bool = False
    is_cached: bool | None = None
    is_same: bool = True


STEP_VARIANTS: tuple[StepVariant, ...] = (
    StepVariant(name=DENSE, label="dense model, not upcycled", kind="dense", is_same=False),
    StepVariant(name=OURS, label="moe_lvlm, the recipe as given"),
    StepVariant(name="padded", label="moe_lvlm, padded batches", is_packed=False),
    StepVariant(name="packed", label="moe_lvlm, packed batches", is_packed=True),
    StepVariant(name="checkpointed", label="moe_lvlm, all layers checkpointed", checkpointed=True),
    StepVariant(name="checkpointed_half", label="moe_lvlm, half of the layers checkpointed", checkpointed=HALF),
    StepVariant(name="full_logits", label="moe_lvlm, language head on all positions", has_all_logits=True),
    StepVariant(name="cached_features", label="moe_lvlm, tower's features cached", is_cached=True),
    StepVariant(name="experts_masked", label="all experts on all tokens, masked", kind="masked"),
    StepVariant(
        name="transformers_eager", label="transformers, eager experts", kind="transformers_eager", is_same=False
    ),
    StepVariant(
        name="transformers_grouped_mm",
        label="transformers, grouped_mm experts",
        kind="transformers_grouped_mm",
        is_same=False,
    ),
    StepVariant(
        name="moe_llava",
        label="MoE-LLaVA's stack: DeepSpeed's einsum, capacity 1.5, padded, checkpointed, all logits",
        kind="moe_llava",
        is_packed=False,
        checkpointed=True,
        has_all_logits=True,
        is_cached=False,
        is_same=False,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A variant for one recipe: fields as in `StepVariant`, none left open. checkpointed: true, false, or layers."""

    kind: Kind
    is_packed: bool
    checkpointed: bool | int
    has_all_logits: bool
    is_cached: bool


def choose_steps(names: str | None) -> tuple[StepVariant, ...]:
    """The steps that `choose_among` gives of STEP_VARIANTS."""
    return choose_among(STEP_VARIANTS, names)


def settle(variant: StepVariant, recipe: Recipe, stage: int) -> Setting:
    """What the variant means for a stage.

    Raises:
        UnavailableError: it means nothing there, or the same as `ours`.
    """
    config = stage_config(recipe, stage)
    given = Setting(
        kind="ours" if variant.kind == "dense" and not is_sparse_at(recipe, stage) else variant.kind,
        is_packed=_or(variant.is_packed, recipe.data.batching == "packed"),
        checkpointed=_checkpointed(variant, recipe, config),
        has_all_logits=variant.has_all_logits,
        is_cached=_or(variant.is_cached, recipe.data.feature_cache is not None),
    )
    if given.kind not in ("dense", "ours") and not is_sparse_at(recipe, stage):
        raise UnavailableError(f"stage {recipe.stages[stage].name} has no experts")
    if given.kind not in ("dense", "ours", "masked") and recipe.parallel.expert_parallel_size > 1:
        raise UnavailableError("its experts are not spread over processes; allowed: parallel.expert_parallel_size=1")
    if given.is_packed and (reason := can_pack(config)) is not None:
        raise UnavailableError(reason)
    if variant.name not in (DENSE, OURS) and given == settle(_OURS, recipe, stage):
        raise UnavailableError("this is the recipe as given: see ours")
    return given


def _or(wanted: bool | None, given: bool) -> bool:
    return given if wanted is None else wanted


def _checkpointed(variant: StepVariant, recipe: Recipe, config: VLMConfig) -> bool | int:
    if variant.checkpointed is None:
        return recipe.train.gradient_checkpointing
    if variant.checkpointed == HALF:
        return max(1, config.text_config.num_hidden_layers // 2)
    return bool(variant.checkpointed)


_OURS = next(variant for variant in STEP_VARIANTS if variant.name == OURS)
