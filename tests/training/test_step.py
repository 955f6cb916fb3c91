"""One step over micro-batches: what its counter is told."""

from __future__ import annotations

from typing import Any

import torch

from moe_lvlm.analysis.measures import LoadCounter
from moe_lvlm.data.loader import MicroBatch
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.training.step import run_step
from tests.parallel.problems import Problem, batches, build


class PlainEngine:
    """What `run_step` asks of an engine, without DeepSpeed."""

    def __init__(self, module: MoELlavaForConditionalGeneration) -> None:
        self.module = module

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass


def test_conflicts_are_counted_after_the_backward_pass_that_finds_them() -> None:
    problem = Problem(routing="stgc")
    model = build(problem)
    model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    counter = LoadCounter()
    micro_batches = [MicroBatch(batch, (), 1) for batch in batches(problem, 0)[:2]]
    run_step(PlainEngine(model), micro_batches, divisor=None, device=torch.device("cpu"), counter=counter)
    summary = counter.summary()
    loads, conflicts = summary["expert_load"], summary["conflicts"]
    assert loads is not None and conflicts is not None
    assert conflicts.keys() == loads.keys()
    for layer, found in conflicts.items():
        assert sum(found["language"]) + sum(found["vision"]) > 0
        for modality, counts in found.items():
            assert all(count <= load for count, load in zip(counts, loads[layer][modality], strict=True))
