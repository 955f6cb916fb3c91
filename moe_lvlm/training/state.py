"""Where a run stands: all that a resume needs besides weights, moments and random generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainState:
    """stage: index of the stage. step: optimizer steps done in it. global_step: done in the run.

    samples: drawn in the stage, bad ones included: the data cursor. bad: those of them that were bad.
    tokens: trained on in the run, without padding. is_stage_done: the stage has all its steps. world_size, expert_parallel_size, zero_stage: the topology at the
    time of saving, for the record; any other may continue.
    """

    stage: int = 0
    step: int = 0
    global_step: int = 0
    samples: int = 0
    bad: int = 0
    tokens: int = 0
    is_stage_done: bool = False
    world_size: int = 1
    expert_parallel_size: int = 1
    zero_stage: int = 0

    def after_step(self, *, samples: int, bad: int, tokens: int) -> TrainState:
        """The state one optimizer step later."""
        return replace(
            self,
            step=self.step + 1,
            global_step=self.global_step + 1,
            samples=self.samples + samples,
            bad=self.bad + bad,
            tokens=self.tokens + tokens,
        )

    def next_stage(self) -> TrainState:
        """The state at the beginning of the next stage."""
        return replace(self, stage=self.stage + 1, step=0, samples=0, bad=0, is_stage_done=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TrainState:
        """Reads its own fields and leaves others alone.

        Raises:
            ValueError: a field is missing.
        """
        names = [field.name for field in fields(TrainState)]
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"state.json: {', '.join(missing)} missing: not a training checkpoint of this version")
        return TrainState(**{name: values[name] for name in names})
