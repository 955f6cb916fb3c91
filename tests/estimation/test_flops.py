"""FLOPs of steps, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moe_lvlm.adapters import attach
from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.estimation.flops import BatchShape, step_flops
from moe_lvlm.estimation.stand_ins import routed_rows
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.training.trainable import select_trainable
from tests.estimation.measured import TOP_2, build
from tests.tiny_models import VOCABULARY

# Llama 64 wide, FFN 176, 4 layers, 4 heads of 16, 2 for keys and values; a tower 16 wide with 2 layers, 4 patches of 4 x 4 pixels
# and a class token; a projector of two layers.
D, F, LAYERS, KV = 64, 176, 4, 32
LENGTHS = (40, 60, 50)
T, SQUARES, SUPERVISED, IMAGES = 150, 1600 + 3600 + 2500, 20, 3
PADDED = BatchShape(sample_lengths=LENGTHS, num_images=IMAGES, supervised=SUPERVISED, padded_to=60)
PACKED = replace(PADDED, padded_to=None)

ATTENTION = 2 * D * D + 2 * D * KV  # q and o, k and v
FFN = 3 * D * F
PAIRS = 2 * SQUARES / 2 * D  # multiply-adds: scores and values, half of each by causality
TOWER = IMAGES * (4 * 3 * 16 * 16 + 2 * (5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 25 * 16))
PROJECTOR = IMAGES * 4 * (16 * D + D * D)
HEAD = SUPERVISED * D * VOCABULARY


@pytest.mark.parametrize("shape", [PADDED, PACKED])
def test_dense_all_trained(shape: BatchShape) -> None:
    flops = step_flops(build(None, "llama", ("connector", "language_model")), shape)
    layers = LAYERS * (T * (ATTENTION + FFN) + PAIRS)
    assert flops.forward == pytest.approx(2 * (TOWER + PROJECTOR + layers + HEAD))
    # of the projector's first layer no input gradient: the tower is frozen
    projector = 2 * PROJECTOR - IMAGES * 4 * 16 * D
    assert flops.backward == pytest.approx(2 * (projector + 2 * layers + 2 * HEAD))
    assert flops.recompute == 0


def test_only_the_projector_is_trained() -> None:
    flops = step_flops(build(None, "llama", ("connector",)), PACKED)
    # no weight gradient in the language model, but attention's two halves both
    through = LAYERS * (T * (ATTENTION + FFN) + 2 * PAIRS) + HEAD
    assert flops.backward == pytest.approx(2 * (2 * PROJECTOR - IMAGES * 4 * 16 * D + through))


@pytest.mark.parametrize("shape", [PADDED, PACKED])
def test_stage_three(shape: BatchShape) -> None:
    """Experts and routers in layers 0 and 2 of 4 are trained, two of four experts a token."""
    flops = step_flops(build(TOP_2, "llama", ("moe",)), shape)
    router = T * D * 4
    attention = T * ATTENTION + PAIRS
    forward = TOWER + PROJECTOR + LAYERS * attention + 2 * T * FFN + 2 * (2 * T * FFN + router) + HEAD
    assert flops.forward == pytest.approx(2 * forward)
    # layer 0: nothing below is trained, so no gradient of its experts' input, nor through its attention
    first = 2 * T * (FFN + D * F) + router
    others = 3 * (T * ATTENTION + 2 * PAIRS) + 2 * T * FFN + 2 * (2 * T * FFN) + 2 * router
    assert flops.backward == pytest.approx(2 * (first + others + HEAD))


def test_a_tail_costs_its_rows() -> None:
    model = build(TOP_2 | {"router": {"kind": "ltdr"}}, "llama", ("moe",))
    plain, tail = (step_flops(model, replace(PACKED, tail_share=share)) for share in (0.0, 0.2))
    rows = 0.2 * T * 2
    assert tail.forward - plain.forward == pytest.approx(2 * 2 * rows * FFN)
    assert tail.six_n - plain.six_n == pytest.approx(6 * 2 * rows * FFN)
    assert routed_rows(moe_layers(model)[0][1].router, tokens=T, tail_share=0.2) == 2 * T + 60


def test_six_n() -> None:
    model = build(TOP_2, "llama", ("moe",))
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    projector = 16 * D + D + D * D + D
    language = LAYERS * (ATTENTION + 2 * D) + 2 * FFN + 2 * (2 * FFN + 4 * D) + D + D * VOCABULARY
    expected = 6 * (tower * IMAGES * 5 + projector * IMAGES * 4 + language * T)
    assert step_flops(model, PADDED).six_n == pytest.approx(expected)


def test_checkpointing_repeats_layers() -> None:
    model = build(TOP_2, "llama", ("moe",))
    dense = T * (ATTENTION + FFN) + PAIRS
    sparse = T * (ATTENTION + 2 * FFN + 4 * D) + PAIRS
    assert step_flops(model, PACKED, checkpointed=1).recompute == pytest.approx(2 * dense)
    assert step_flops(model, PACKED, checkpointed=3).recompute == pytest.approx(2 * (2 * dense + sparse))
    assert step_flops(model, PACKED, checkpointed=True).recompute == pytest.approx(2 * 2 * (dense + sparse))


def test_padding_is_told_apart() -> None:
    model = build(None, "llama", ("connector", "language_model"))
    padded, packed = step_flops(model, PADDED), step_flops(model, PACKED)
    assert padded.forward == pytest.approx(packed.forward)
    assert packed.padding == pytest.approx(0, abs=1)
    # three products a matrix and token; six of attention's, over all pairs of each padded row
    positions = LAYERS * 3 * (180 - T) * (ATTENTION + FFN)
    pairs = LAYERS * 3 * 2 * D * (3 * 60 * 60 - SQUARES / 2)
    assert padded.padding == pytest.approx(2 * (positions + pairs))


def test_a_cached_tower_does_not_run() -> None:
    model = build(TOP_2, "llama", ("moe",))
    whole, cached = step_flops(model, PADDED), step_flops(model, PADDED, runs_tower=False)
    assert whole.forward - cached.forward == pytest.approx(2 * TOWER)
    assert whole.backward == cached.backward


def test_eager_attention_counts_the_same() -> None:
    model = build(TOP_2, "llama", ("moe",))
    fused = step_flops(model, PADDED)
    model.model.language_model.set_attn_implementation("eager")
    eager = step_flops(model, PADDED)
    assert (eager.forward, eager.backward) == pytest.approx((fused.forward, fused.backward))


@pytest.mark.parametrize("shape", [PADDED, PACKED])
def test_lora(shape: BatchShape) -> None:
    model = build(None, "llama", ("connector",))
    before = step_flops(model, shape)
    settings: dict[str, Any] = {"rank": 8, "alpha": 16, "target_modules": ("q_proj",)}
    attach(model.model.language_model, LoRASettings(**settings))
    select_trainable(model, ("adapter",))
    assert step_flops(model, shape).forward - before.forward == pytest.approx(2 * LAYERS * T * 8 * 2 * D)


@pytest.mark.parametrize("shape", [PADDED, PACKED])
@pytest.mark.parametrize("gating", ["cluster", "token", "sentence"])
def test_lora_experts(gating: str, shape: BatchShape) -> None:
    model = build(None, "llama", ("connector",))
    before = step_flops(model, shape)
    settings: dict[str, Any] = {"rank": 8, "alpha": 16, "target_modules": ("q_proj",), "gating": gating}
    attach(model.model.language_model, MoCLESettings(**settings))
    select_trainable(model, ("adapter",))
    # one expert and the universal one
    assert step_flops(model, shape).forward - before.forward == pytest.approx(2 * LAYERS * T * 2 * 8 * 2 * D)


def test_the_model_stays_as_it_is() -> None:
    model = build(TOP_2, "llama", ("moe",)).eval()
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    step_flops(model, PADDED)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_meta_tensors_will_do() -> None:
    model = build(TOP_2, "llama", ("moe",))
    expected = step_flops(model, PADDED)
    assert step_flops(model.to("meta"), PADDED) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sample_lengths": ()}, "sample_lengths"),
        ({"padded_to": 59}, "padded_to: 59; allowed: 60"),
        ({"supervised": 151}, "supervised: 151; allowed: 0 to 150"),
        ({"num_images": -1}, "num_images: -1"),
        ({"tail_share": 1.5}, "tail_share: 1.5; allowed: 0 to 1"),
    ],
)
def test_shapes_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PADDED, **wrong)


def test_another_model() -> None:
    with pytest.raises(ValueError, match="Linear: not a model of this project"):
        step_flops(nn.Linear(2, 2), PADDED)


def test_dtype_changes_nothing() -> None:
    model = build(TOP_2, "llama", ("moe",))
    expected = step_flops(model, PADDED)
    assert step_flops(model.to(torch.float64), PADDED) == expected
