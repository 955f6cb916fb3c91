"""What a timed step needs, and what `tools/estimate.py` would have said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.measure import MIB
from moe_lvlm.config.deepspeed import resolve_deepspeed
from moe_lvlm.config.recipe import Recipe
from moe_lvlm.estimation.flops import checkpointed_layers, count_flops
from moe_lvlm.estimation.hardware import Hardware
from moe_lvlm.estimation.memory import saved_bytes
from moe_lvlm.estimation.probe import Probe
from moe_lvlm.estimation.shape import BatchShape
from moe_lvlm.estimation.step import Setting, estimate_step, probe_model
from moe_lvlm.models.build import VLM, build_empty
from moe_lvlm.training.build import stage_config
from moe_lvlm.training.trainable import select_trainable

# Once a step, not once a micro-batch
_OF_A_STEP = ("ZeRO", "optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of a step of one process, by the roofline. saved_mib: of its largest micro-batch."""

    seconds: float
    saved_mib: float


class StepOnPaper:
    """The micro-batches of one process's step. shapes: of each. recipe: whose stage trains the model, as `recipe_of` gives
    it. has_tower: False where features come from a cache."""

    def __init__(
        self, recipe: Recipe, stage: int, shapes: Sequence[BatchShape], *, world_size: int, has_tower: bool
    ) -> None:
        self._model: VLM = build_empty(stage_config(recipe, stage))
        select_trainable(self._model, recipe.stages[stage].train)
        deepspeed = resolve_deepspeed(recipe, recipe.stages[stage], world_size)
        self._setting = Setting(
            precision=recipe.train.precision,
            zero=deepspeed["zero_optimization"],
            world_size=world_size,
            expert_parallel_size=recipe.parallel.expert_parallel_size,
            runs_tower=has_tower,
        )
        self._shapes = shapes
        self._probes: list[Probe] = [probe_model(self._model, shape, self._setting) for shape in shapes]

    def flops(self) -> tuple[float, float]:
        """(needed, by 6N), whatever is computed again."""
        found = [
            count_flops(self._model, shape, probe) for shape, probe in zip(self._shapes, self._probes, strict=True)
        ]
        return sum(one.needed for one in found), sum(one.six_n for one in found)

    def estimate(self, hardware: Hardware, checkpointed: bool | int) -> Estimate:
        """Time and what autograd keeps, on paper. checkpointed: `train.gradient_checkpointing`."""
        setting = replace(self._setting, checkpointed=checkpointed)
        seconds = 0.0
        once = dict.fromkeys(_OF_A_STEP, 0.0)
        for shape, probe in zip(self._shapes, self._probes, strict=True):
            step = estimate_step(self._model, shape, setting, hardware, probed=probe)
            for kind, value in step.seconds.items():
                if kind in once:
                    once[kind] = max(once[kind], value)
                else:
                    seconds += value
        repeated = checkpointed_layers(self._model, checkpointed)
        saved = max(sum(saved_bytes(probe, repeated).values()) for probe in self._probes)
        return Estimate(seconds=seconds + sum(once.values()), saved_mib=saved / MIB)
