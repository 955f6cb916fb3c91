"""The learning rate by hand and by transformers, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import OptimizerSettings, ScheduleSettings
from moe_lvlm.training.optimizer import learning_rate_at, parameter_groups
from tests.tiny_models import tiny_moe_llava


def rates(num_steps: int, schedule: ScheduleSettings, peak: float = 1.0) -> list[float]:
    return [learning_rate_at(step, num_steps=num_steps, peak=peak, schedule=schedule) for step in range(num_steps)]


def test_by_hand() -> None:
    # warm-up: 1/2, 1; then 4 steps over which progress is 0, 1/4, 1/2, 3/4
    half = math.sqrt(0.5) / 2
    cosine = [0.5, 1.0, 1.0, 0.5 + half, 0.5, 0.5 - half]
    assert rates(6, ScheduleSettings(warmup_steps=2)) == pytest.approx(cosine)
    linear = ScheduleSettings(kind="linear", warmup_steps=2, final_ratio=0.2)
    assert rates(6, linear, peak=10.0) == pytest.approx([5, 10, 10, 8, 6, 4])
    floor = ScheduleSettings(warmup_steps=2, final_ratio=0.2)
    assert rates(6, floor) == pytest.approx([0.5, 1.0, *(0.2 + 0.8 * one for one in cosine[2:])])
    assert rates(4, ScheduleSettings(kind="constant", warmup_steps=0)) == [1.0] * 4
    # the ratio is rounded up: 0.03 x 40 = 1.2 -> 2 steps
    assert rates(40, ScheduleSettings(kind="constant"))[:3] == [0.5, 1.0, 1.0]
    # all of it warm-up
    assert rates(4, ScheduleSettings(warmup_ratio=1.0)) == [0.25, 0.5, 0.75, 1.0]
    assert rates(2, ScheduleSettings(warmup_steps=4)) == [0.25, 0.5]


def test_warm_up_from_above_0() -> None:
    """Q-MoE's 1e-6 to 5e-5 in 600 steps; a small one by hand; LAVIS' formula, whose warm-up is a step behind ours."""
    schedule = ScheduleSettings(warmup_steps=4, warmup_from=0.2)
    assert rates(6, schedule)[:5] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates(6, schedule)[3:] == rates(6, ScheduleSettings(warmup_steps=4))[3:]

    schedule = ScheduleSettings(warmup_steps=600, warmup_from=1e-6)
    found = [learning_rate_at(step, num_steps=50_000, peak=5e-5, schedule=schedule) for step in range(600)]
    assert found == pytest.approx([1e-6 + (5e-5 - 1e-6) * (step + 1) / 600 for step in range(600)])
    assert found[-1] == 5e-5


def test_from_0_is_the_ratio_to_the_bit() -> None:
    for warmup in (3, 7, 600):
        found = [learning_rate_at(step, num_steps=1000, peak=3e-4, schedule=ScheduleSettings(warmup_steps=warmup))
                 for step in range(warmup)]  # fmt: skip
        assert found == [3e-4 * (step + 1) / warmup for step in range(warmup)]


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_after_warm_up_as_transformers(kind: str, warmup: int) -> None:
    """Theirs begins its warm-up at 0, one step behind ours; from the end of the warm-up on both are the same."""
    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[kind]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=30)
    theirs = []
    for _ in range(30):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = rates(30, ScheduleSettings.model_validate({"kind": kind, "warmup_steps": warmup}), peak=0.3)
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1])


def test_groups_by_hand() -> None:
    """Phi has biases in its experts: stacked [E, F] or [E, D], they are biases all the same."""
    model = tiny_moe_llava(MoEConfig(layers=(1,), num_experts=2, shared_experts=1), family="phi")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layer = "model.language_model.layers.1."
    decays = [
        f"{layer}self_attn.q_proj.weight",
        f"{layer}mlp.router.gate.weight",
        f"{layer}mlp.experts.w1",
        f"{layer}mlp.experts.w2",
        f"{layer}mlp.shared_experts.0.fc1.weight",
        "model.language_model.embed_tokens.weight",
    ]
    stays = [
        f"{layer}self_attn.q_proj.bias",
        f"{layer}input_layernorm.weight",
        f"{layer}mlp.experts.b1",
        f"{layer}mlp.experts.b2",
        f"{layer}mlp.shared_experts.0.fc1.bias",
        "model.vision_tower.embeddings.class_embedding",
        "model.language_model.final_layernorm.bias",
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name in (*decays, *stays):
        model.get_parameter(name).requires_grad_(True)
    decay, no_decay = parameter_groups(model, learning_rate=0.5, settings=OptimizerSettings(weight_decay=0.1))
    assert {names[id(one)] for one in decay.pop("params")} == set(decays)
    assert {names[id(one)] for one in no_decay.pop("params")} == set(stays)
    assert decay == {"name": "decay", "lr": 0.5, "weight_decay": 0.1}
    assert no_decay == {"name": "no_decay", "lr": 0.5, "weight_decay": 0.0}


def test_an_empty_group_is_left_out() -> None:
    linear = nn.Linear(2, 2, bias=False)
    groups = parameter_groups(linear, learning_rate=1.0, settings=OptimizerSettings())
    assert [group["name"] for group in groups] == ["decay"]
    # under ZeRO 3 a parameter is empty here and keeps its shape on the side
    linear.weight = nn.Parameter(torch.empty(0))
    linear.weight.ds_shape = torch.Size((2, 2))  # type: ignore[attr-defined]
    groups = parameter_groups(linear, learning_rate=1.0, settings=OptimizerSettings())
    assert [group["name"] for group in groups] == ["decay"]
