"""Which parameters each part's name stands for."""

from __future__ import annotations

import pytest

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.training.trainable import PARTS, select_trainable
from tests.tiny_models import tiny_llava, tiny_moe_llava

LAYERS = "model.language_model.layers"
ROUTERS = {f"{LAYERS}.{layer}.mlp.router.gate.weight" for layer in (0, 2)}
EXPERTS = {f"{LAYERS}.{layer}.mlp.experts.{leaf}" for layer in (0, 2) for leaf in ("w1", "w2", "w3")}
SHARED = {
    f"{LAYERS}.{layer}.mlp.shared_experts.0.{leaf}.weight"
    for layer in (0, 2)
    for leaf in ("gate_proj", "up_proj", "down_proj")
}
DENSE_FFN = {f"{LAYERS}.1.mlp.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")}
CONNECTOR = {f"model.multi_modal_projector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}


@pytest.fixture(scope="module")
def model() -> MoELlavaForConditionalGeneration:
    """Three layers, the first and the last one sparse."""
    return tiny_moe_llava(MoEConfig(num_experts=2, top_k=1, shared_experts=1))


def trained(model: MoELlavaForConditionalGeneration, *parts: str) -> set[str]:
    select_trainable(model, parts)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_by_hand(model: MoELlavaForConditionalGeneration) -> None:
    assert trained(model, "connector") == CONNECTOR
    assert trained(model, "router") == ROUTERS
    assert trained(model, "experts") == EXPERTS | SHARED
    assert trained(model, "moe") == ROUTERS | EXPERTS | SHARED
    assert trained(model, "dense_ffn") == DENSE_FFN
    everything = {name for name, _ in model.named_parameters()}
    tower = {name for name in everything if "vision" in name}
    assert tower
    assert trained(model, "vision_tower") == tower
    assert trained(model, "language_model") == everything - tower - CONNECTOR
    assert "lm_head.weight" in trained(model, "language_model")
    assert trained(model, "connector", "language_model", "vision_tower") == everything


def test_what_moe_llava_released(model: MoELlavaForConditionalGeneration) -> None:
    """Its scripts train every `mlp.*`, sparse or not, and so the projector; its paper says the experts alone."""
    released = ROUTERS | EXPERTS | SHARED | DENSE_FFN | CONNECTOR
    assert trained(model, "moe", "dense_ffn", "connector") == released
    assert trained(model, "released") == released
    assert trained(model, "released", r"re:^lm_head\.weight$") == released | {"lm_head.weight"}


def test_expressions_are_searched_for(model: MoELlavaForConditionalGeneration) -> None:
    assert trained(model, r"re:\.gate\.") == ROUTERS
    assert trained(model, r"re:language_model\.layers\.1\.mlp", "router") == DENSE_FFN | ROUTERS
    assert trained(model, r"re:^lm_head\.weight$") == {"lm_head.weight"}


def test_a_choice_replaces_the_one_before(model: MoELlavaForConditionalGeneration) -> None:
    trained(model, "language_model")
    assert trained(model, "router") == ROUTERS


@pytest.mark.parametrize("part", ["projector", "re:no_such_thing", "re:layers.(1"])
def test_unknown_and_empty(part: str, model: MoELlavaForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="train: ") as caught:
        select_trainable(model, [part])
    assert repr(part) in str(caught.value)
    if part == "projector":
        assert all(name in str(caught.value) for name in PARTS)


def test_a_dense_model_has_no_experts() -> None:
    dense = as_moe_llava(tiny_llava())
    assert trained(dense, "dense_ffn") == DENSE_FFN | {
        name.replace(".1.", f".{n}.") for name in DENSE_FFN for n in (0, 2)
    }
    for part in ("moe", "router", "experts"):
        with pytest.raises(ValueError, match=f"'{part}' names no parameter of this model"):
            select_trainable(dense, [part])
    with pytest.raises(ValueError, match="'moe' names no parameter of this model"):
        select_trainable(dense, ["released"])
