"""A stage of a recipe on paper: as it stands, and with other settings of what does not change its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from moe_lvlm.config.deepspeed import deepspeed_folder, resolve_deepspeed
from moe_lvlm.config.errors import RecipeError
from moe_lvlm.config.recipe import ParallelSettings, Recipe, StageSettings
from moe_lvlm.estimation.hardware import Hardware
from moe_lvlm.estimation.parts import VLM
from moe_lvlm.estimation.probe import Probe
from moe_lvlm.estimation.samples import MicroBatches, SampleLengths, expect_micro_batches
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.estimation.step import Setting, StepEstimate, estimate_step, probe_model
from moe_lvlm.models.images import image_size
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.moe.upcycle import moe_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What may be chosen without another result, but for micro_batch, which changes statistics of routers.

    deepspeed: as in `parallel.deepspeed`. checkpointed: `train.gradient_checkpointing`.
    """

    deepspeed: str
    expert_parallel_size: int
    checkpointed: bool | int
    micro_batch: int

    def overrides(self, stage: int) -> str:
        """To paste behind a recipe's name."""
        checkpointed = str(self.checkpointed).lower()
        return (
            f"parallel.deepspeed={self.deepspeed} parallel.expert_parallel_size={self.expert_parallel_size} "
            f"train.gradient_checkpointing={checkpointed} stages.{stage}.micro_batch={self.micro_batch}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """estimate: time by the typical micro-batch. peak: memory by the largest."""

    choice: Choice
    estimate: StepEstimate
    peak: StepEstimate
    batches: MicroBatches

    def missing(self, hardware: Hardware) -> float:
        """Bytes of the device that are short; 0 and below: it fits."""
        return self.peak.memory.device - hardware.memory_bytes


@dataclass
class Planner:
    """One stage on one kind of machine. What was drawn and probed is kept, so that many choices cost little more than one,
    and planners that `dataclasses.replace` makes share it.

    model: of the stage, on meta tensors (`stage_model`).
    """

    recipe: Recipe
    stage: int
    model: VLM
    hardware: Hardware
    nodes: int
    lengths: SampleLengths
    tail_share: float = 0.0
    _batches: dict[tuple[int, int, int], MicroBatches] = field(default_factory=dict)
    _shapes: dict[int, MicroBatches] = field(default_factory=dict)
    _probes: dict[tuple[BatchShape, bool], Probe] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.nodes * self.hardware.devices

    @property
    def settings(self) -> StageSettings:
        return self.recipe.stages[self.stage]

    @property
    def as_it_stands(self) -> Choice:
        return Choice(
            deepspeed=self.recipe.parallel.deepspeed,
            expert_parallel_size=self.recipe.parallel.expert_parallel_size,
            checkpointed=self.recipe.train.gradient_checkpointing,
            micro_batch=self.settings.micro_batch,
        )

    def plan(self, choice: Choice) -> Plan:
        """Raises RecipeError for what training would refuse."""
        deepspeed = self._resolve(choice)
        batches = self._micro_batches(choice.micro_batch)
        setting = Setting(
            precision=self.recipe.train.precision,
            zero=deepspeed["zero_optimization"],
            world_size=self.world_size,
            expert_parallel_size=choice.expert_parallel_size,
            checkpointed=choice.checkpointed,
            num_micro_batches=deepspeed["gradient_accumulation_steps"],
            runs_tower=self.recipe.data.feature_cache is None,
        )
        typical, largest = (
            self._estimate(choice, batches, setting, is_largest=is_largest) for is_largest in (False, True)
        )
        return Plan(choice=choice, estimate=_wait(typical, batches.imbalance), peak=largest, batches=batches)

    def search(
        self, *, any_micro_batch: bool = False, advance: Callable[[], None] = lambda: None
    ) -> tuple[list[Plan], list[Plan]]:
        """All choices that training would take: those that fit, best first, and those that do not, the nearest first.

        Of numbers of checkpointed layers only the least that fits is kept beside none and all.
        """
        fitting: list[Plan] = []
        short: list[Plan] = []
        for choice in self._choices(any_micro_batch=any_micro_batch):
            try:
                plan = self.plan(choice)
            except RecipeError:  # what training refuses is no choice
                continue
            advance()
            if plan.missing(self.hardware) <= 0:
                fitting.append(plan)
                continue
            short.append(plan)
            if choice.checkpointed is False and (least := self._least_checkpointed(choice)) is not None:
                fitting.append(least)
        fitting.sort(key=lambda plan: plan.estimate.total_seconds)
        short.sort(key=lambda plan: plan.missing(self.hardware))
        return fitting, short

    def _resolve(self, choice: Choice) -> dict[str, Any]:
        parallel = ParallelSettings(deepspeed=choice.deepspeed, expert_parallel_size=choice.expert_parallel_size)
        recipe = self.recipe.model_copy(update={"parallel": parallel})
        settings = self.settings
        if settings.global_batch % choice.micro_batch:
            raise RecipeError(f"micro_batch: {choice.micro_batch} does not divide global_batch {settings.global_batch}")
        stage = settings.model_copy(update={"micro_batch": choice.micro_batch})
        return resolve_deepspeed(recipe, stage, self.world_size)

    def _choices(self, *, any_micro_batch: bool) -> Iterator[Choice]:
        sizes = [self.settings.micro_batch]
        if any_micro_batch:
            each = self.settings.global_batch // self.world_size
            sizes = [size for size in range(1, each + 1) if each % size == 0] or sizes
        experts = {layer.router.num_experts for _, layer in moe_layers(self.model)}
        groups = [1, *(size for size in range(2, self.world_size + 1) if _divides(size, experts, self.world_size))]
        for micro_batch in sizes:
            for deepspeed in sorted(path.stem for path in deepspeed_folder().glob("*.json")):
                for size in groups:
                    for checkpointed in (False, True):
                        yield Choice(
                            deepspeed=deepspeed,
                            expert_parallel_size=size,
                            checkpointed=checkpointed,
                            micro_batch=micro_batch,
                        )

    def _least_checkpointed(self, choice: Choice) -> Plan | None:
        """The plan with the fewest checkpointed layers that fits, but for all of them; by halving, since memory falls."""
        low, high = 1, len(self.model.language_layers()) - 1
        found: Plan | None = None
        while low <= high:
            middle = (low + high) // 2
            plan = self.plan(replace(choice, checkpointed=middle))
            if plan.missing(self.hardware) <= 0:
                found, high = plan, middle - 1
            else:
                low = middle + 1
        return found

    def _micro_batches(self, micro_batch: int) -> MicroBatches:
        key = (micro_batch, self.settings.global_batch, self.world_size)
        if key not in self._batches:
            data = self.recipe.data
            drawn = expect_micro_batches(
                self.lengths,
                visual_tokens=visual_tokens(self.model),
                micro_batch=micro_batch,
                global_batch=self.settings.global_batch,
                world_size=self.world_size,
                batching=data.batching,
                balance=data.balance,
                tail_share=self.tail_share,
            )
            # Micro-batches of one size are much the same whatever the step, and a probe is dear
            first = self._shapes.setdefault(micro_batch, drawn)
            self._batches[key] = replace(drawn, typical=first.typical, largest=first.largest)
        return self._batches[key]

    def _estimate(self, choice: Choice, batches: MicroBatches, setting: Setting, *, is_largest: bool) -> StepEstimate:
        shape = batches.largest if is_largest else batches.typical
        key = (shape, choice.expert_parallel_size > 1)
        if key not in self._probes:
            self._probes[key] = probe_model(self.model, shape, setting)
        return estimate_step(self.model, shape, setting, self.hardware, probed=self._probes[key])


def visual_tokens(model: VLM) -> int:
    """That an image becomes in the language model."""
    config = model.config
    if isinstance(model, MoEInstructBlipForConditionalGeneration) or config.qformer is not None:
        return int(config.num_query_tokens)
    height, width = image_size(config.vision_config)
    patch = config.vision_config.patch_size
    return (height // patch) * (width // patch)


def _divides(size: int, experts: set[int], world_size: int) -> bool:
    return bool(experts) and world_size % size == 0 and all(count % size == 0 for count in experts)


def _wait(estimate: StepEstimate, imbalance: float) -> StepEstimate:
    """The same with the time that processes wait for the one whose micro-batch is the largest."""
    computing = sum(seconds for kind, seconds in estimate.seconds.items() if kind not in ("ZeRO", "optimizer"))
    return replace(estimate, seconds={**estimate.seconds, "waiting for the largest": computing * (imbalance - 1)})
