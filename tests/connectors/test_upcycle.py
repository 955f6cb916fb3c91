"""A Q-Former that becomes Q-MoE computes what it did, and its experts are copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.connectors.task_experts import TaskExpertsLayer
from moe_lvlm.connectors.upcycle import dense_name, experts_of, upcycle_qformer
from tests.connectors.slow_qmoe import ROUTERS, tiny_batch, tiny_config, tiny_qformer, tiny_upcycled

every_router = pytest.mark.parametrize("router", ROUTERS)


@every_router
@pytest.mark.parametrize("has_general", [True, False])
@pytest.mark.parametrize("selection", ["path", "greedy"])
@pytest.mark.parametrize("num_layers", [1, 4])
def test_step_0_is_the_plain_q_former(router: str, has_general: bool, selection: str, num_layers: int) -> None:
    """Beside transformers' own model, queries and words."""
    batch = tiny_batch(5, dtype=torch.float32)
    expected = tiny_qformer()(**batch)
    model = tiny_upcycled(
        tiny_qformer(),
        router=router,
        has_general_expert=has_general,
        selection=selection,
        num_layers=num_layers,
        normalize_output=True,
    )
    output = model(**batch)
    is_real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        output.last_hidden_state[is_real], expected.last_hidden_state[is_real], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)


def test_step_0_with_routers_that_have_learned() -> None:
    """Equal experts give the plain Q-Former whatever the routers say."""
    batch = tiny_batch(3, dtype=torch.float32)
    model = tiny_upcycled(tiny_qformer(), normalize_output=True, num_layers=3)
    for _, layer in experts_of(model):
        torch.nn.init.normal_(layer.router.weight, std=3.0)
    is_real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        model(**batch).last_hidden_state[is_real],
        tiny_qformer()(**batch).last_hidden_state[is_real],
        rtol=0,
        atol=1e-5,
    )


def test_without_normalisation_the_first_layer_adds_g_times_the_expert() -> None:
    """SPEC's default: equal experts, general f(x) + g f(x) = (1 + g) f(x) of the queries, words as they were."""
    batch = tiny_batch(3, dtype=torch.float32)
    model = tiny_upcycled(tiny_qformer(), num_layers=1, num_experts=4, router="post")
    plain = tiny_qformer()(**batch).last_hidden_state
    output = model(**batch).last_hidden_state
    torch.testing.assert_close(output[:, :3], 1.25 * plain[:, :3], rtol=0, atol=1e-5)
    torch.testing.assert_close(output[:, 3:], plain[:, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_general", [True, False])
def test_parts_are_taken_over_and_experts_are_copies(has_general: bool) -> None:
    dense = tiny_qformer()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    owned = dict(dense.named_parameters())
    model = tiny_upcycled(dense, num_experts=3, has_general_expert=has_general)
    new = dict(model.named_parameters())
    assert [name for name, _ in experts_of(model)] == ["encoder.layer.2", "encoder.layer.3"]
    assert (model.encoder.layer[3].general is None) is not has_general
    for name, parameter in new.items():
        if name.endswith(".router.weight"):
            continue
        origin = dense_name(name)
        if origin is None:
            assert parameter is owned[name]
        else:
            assert parameter is not owned[origin]
            assert torch.equal(parameter, before[origin])
    storages = [parameter.data_ptr() for parameter in new.values()]
    assert len(set(storages)) == len(storages)
    # Nothing of the dense model is missing: under its name, or as each expert's beginning
    assert {dense_name(name) or name for name in new if ".router." not in name} == set(owned)


def test_routers_are_drawn_from_the_seed_in_any_type() -> None:
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        dense = tiny_qformer().to(dtype)
        torch.manual_seed(4)
        model = tiny_upcycled(dense, router="pre")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        drawn.append(torch.cat([layer.router.weight.float() for _, layer in experts_of(model)]))
    assert drawn[0].abs().max() < 0.1  # N(0, 0.02), not transformers' initializer_range of 0.3
    assert not torch.equal(drawn[0][:3], drawn[0][3:])
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0.01, atol=0)


def test_a_new_model_s_routers_start_small_too() -> None:
    model = QMoEModel(tiny_config(), ExpertSettings(num_layers=2, router="cls", num_experts=8))
    weights = torch.cat([layer.router.weight for _, layer in experts_of(model)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.25)
    ffn = model.encoder.layer[3].experts[0].intermediate_query.dense.weight
    assert ffn.std().item() == pytest.approx(0.3, rel=0.25)


def test_mode_checkpointing_and_recording_come_along() -> None:
    dense = tiny_qformer().train()
    batch = tiny_batch(2, dtype=torch.float32)
    dense(**batch, output_hidden_states=True)  # installs transformers' recording hooks
    dense.gradient_checkpointing_enable({"use_reentrant": False})
    model = tiny_upcycled(dense, noise=0.0)
    assert model.training and all(layer.gradient_checkpointing for layer in model.encoder.layer)
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    output.last_hidden_state.sum().backward()


def test_meta_tensors() -> None:
    with torch.device("meta"):
        dense = tiny_qformer()
    model = tiny_upcycled(dense)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "model.qformer.encoder.layer.7.experts.2.output_query.dense.bias",
            "model.qformer.encoder.layer.7.output_query.dense.bias",
        ),
        (
            "encoder.layer.11.general.intermediate_query.dense.weight",
            "encoder.layer.11.intermediate_query.dense.weight",
        ),
        ("layer.0.experts.10.output_query.LayerNorm.weight", "layer.0.output_query.LayerNorm.weight"),
        ("encoder.layer.7.router.weight", None),
        ("encoder.layer.7.output.dense.bias", None),
        ("encoder.layer.7.output_query.dense.bias", None),
        ("language_model.layers.7.mlp.experts.w1", None),
    ],
)
def test_dense_names(name: str, expected: str | None) -> None:
    assert dense_name(name) == expected


def test_other_models_are_refused() -> None:
    blip2 = Blip2QFormerModel(
        Blip2QFormerConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match=r"Blip2QFormerModel cannot get task experts; allowed: InstructBlipQFormerM"):
        upcycle_qformer(blip2, ExpertSettings())
    with pytest.raises(ValueError, match="QMoEModel cannot get task experts"):
        upcycle_qformer(tiny_upcycled(tiny_qformer()), ExpertSettings(num_layers=2))
    with pytest.raises(ValueError, match=r"connector.experts.num_layers: 6"):
        upcycle_qformer(tiny_qformer(), ExpertSettings())


def test_parts_of_a_layer() -> None:
    """The names that checkpoints hold."""
    model = tiny_upcycled(tiny_qformer(), num_experts=2)
    layer = model.encoder.layer[2]
    assert isinstance(layer, TaskExpertsLayer)
    assert {name for name, _ in layer.named_children()} == {
        "attention", "crossattention", "intermediate", "output", "experts", "general", "router",
    }  # fmt: skip
    assert "crossattention" not in dict(model.encoder.layer[3].named_children())


@pytest.mark.parametrize(
    "settings", [{"num_experts": 0}, {"num_paths": 0}, {"router": "top_k"}, {"noise": -1}], ids=str
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ExpertSettings(**settings)
