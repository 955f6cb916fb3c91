"""Plans of a tiny recipe: which settings there are, which fit, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_lvlm.config.deepspeed import resolve_deepspeed
from moe_lvlm.config.errors import RecipeError
from moe_lvlm.config.load import load_recipe
from moe_lvlm.estimation.architectures import stage_model
from moe_lvlm.estimation.hardware import GIB, find_hardware
from moe_lvlm.estimation.plan import Choice, Planner
from moe_lvlm.estimation.samples import SampleLengths
from moe_lvlm.estimation.scaling import STRONG, WEAK, efficiency, scale, scaling_json, scaling_page
from moe_lvlm.estimation.step import Setting, estimate_step
from tests.estimation.measured import TOP_2, build, samples, shape_of
from tests.tiny_run import write_run_inputs

A800 = find_hardware("a800-80g")
NODE = replace(A800, devices=4, reserved_bytes=0.0)


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """Four GPUs; the stage's batch of 8 is 2 a GPU."""
    path = write_run_inputs(tmp_path_factory.mktemp("tiny"))
    recipe = load_recipe(path, ["stages.1.micro_batch=1", "stages.1.global_batch=8"])
    return Planner(
        recipe=recipe,
        stage=1,
        model=stage_model(recipe, 1),
        hardware=NODE,
        nodes=1,
        lengths=SampleLengths(mean_text=20, max_length=64),
    )


def test_all_that_training_would_take(planner: Planner) -> None:
    fitting, short = planner.search()
    assert not short
    found = {plan.choice for plan in fitting}
    files = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    assert found == {
        Choice(deepspeed=file, expert_parallel_size=size, checkpointed=checkpointed, micro_batch=1)
        for file in files
        for size in (1, 2, 4)
        for checkpointed in (False, True)
    }
    times = [plan.estimate.total_seconds for plan in fitting]
    assert times == sorted(times)
    for plan in fitting:  # pasted, they are a recipe that training takes
        overrides = plan.choice.overrides(1).split()
        recipe = load_recipe("quickstart", [one for one in overrides if not one.startswith("stages")])
        assert recipe.parallel.expert_parallel_size == plan.choice.expert_parallel_size
        assert recipe.train.gradient_checkpointing == plan.choice.checkpointed
        resolve_deepspeed(recipe, planner.settings, 4)


def test_other_micro_batches_are_asked_for(planner: Planner) -> None:
    assert {plan.choice.micro_batch for plan in planner.search(any_micro_batch=True)[0]} == {1, 2}


def test_what_does_not_fit(planner: Planner) -> None:
    """Room for what the cheapest setting takes, and a little more: only settings below stay, layers are checkpointed."""
    fitting, _ = planner.search()
    plain = next(one for one in fitting if one.choice.deepspeed == "zero2" and one.choice.expert_parallel_size == 1
                 and one.choice.checkpointed is False)  # fmt: skip
    full = planner.plan(replace(plain.choice, checkpointed=True))
    between = (plain.peak.memory.device + full.peak.memory.device) / 2
    tight = replace(planner, hardware=replace(NODE, memory_bytes=between))
    fitting, short = tight.search()
    assert all(one.peak.memory.device <= between for one in fitting)
    assert all(one.peak.memory.device > between for one in short)
    assert plain.choice in {one.choice for one in short}
    partial = [
        one.choice.checkpointed
        for one in fitting
        if one.choice.deepspeed == "zero2" and type(one.choice.checkpointed) is int
    ]
    layers = len(planner.model.language_layers())
    assert all(0 < count < layers for count in partial)
    for one in fitting:
        if type(one.choice.checkpointed) is int and one.choice.checkpointed > 1:
            fewer = tight.plan(replace(one.choice, checkpointed=one.choice.checkpointed - 1))
            assert fewer.peak.memory.device > between


def test_what_training_refuses(planner: Planner) -> None:
    choice = planner.as_it_stands
    with pytest.raises(RecipeError, match="does not divide the number of processes"):
        planner.plan(replace(choice, expert_parallel_size=3))
    with pytest.raises(RecipeError, match="global_batch 8 is not a multiple"):
        replace(planner, nodes=4).plan(choice)


def test_more_of_everything_takes_longer() -> None:
    model, shape = build(TOP_2, "llama", ("moe",)), shape_of(samples())
    zero = {"stage": 2, "reduce_bucket_size": 1000}
    setting = Setting(precision="bf16", zero=zero, world_size=4, num_micro_batches=2)
    base = estimate_step(model, shape, setting, NODE)
    again = estimate_step(model, shape, replace(setting, checkpointed=True), NODE)
    spread = estimate_step(model, shape, replace(setting, expert_parallel_size=2), NODE)
    offloaded = estimate_step(
        model, shape, replace(setting, zero=zero | {"offload_optimizer": {"device": "cpu"}}), NODE
    )
    assert base.seconds["all-to-all"] == 0 and "recompute" not in base.seconds
    assert again.seconds["recompute"] > 0 and again.memory.saved < base.memory.saved
    assert spread.seconds["all-to-all"] > 0
    assert spread.memory.states["weights, experts"] == base.memory.states["weights, experts"] / 2
    assert offloaded.seconds["optimizer"] > base.seconds["optimizer"]
    assert offloaded.memory.states["optimizer, experts"] == 0 < base.memory.states["optimizer, experts"]
    assert base.tokens == shape.tokens * 8 and base.samples == len(shape.sample_lengths) * 8
    work = base.flops.needed * 2
    assert base.mfu == pytest.approx(work / base.total_seconds / NODE.flops["bf16"])
    with pytest.raises(ValueError, match="precision: fp8"):
        estimate_step(model, shape, replace(setting, precision="fp8"), NODE)


def test_scaling(planner: Planner) -> None:
    points = scale(planner, nodes=(1, 2, 4))
    assert [(one.kind, one.gpus, one.global_batch) for one in points] == [
        (WEAK, 4, 8), (STRONG, 4, 8), (WEAK, 8, 16), (STRONG, 8, 8), (WEAK, 16, 32), (STRONG, 16, 8),
    ]  # fmt: skip
    assert points[-1].plan is None  # 8 samples for 16 GPUs
    assert efficiency(points, WEAK)[4] == efficiency(points, STRONG)[4] == 1.0
    assert 0 < efficiency(points, WEAK)[16] <= 1.0
    assert "| strong | 16 | 8 | | not a sample for each GPU |" in scaling_page(points)
    records = scaling_json(points)
    assert [record["gpus"] for record in records] == [4, 4, 8, 8, 16, 16]
    assert "deepspeed" not in records[-1] and records[0]["device_bytes"] < 8 * GIB
