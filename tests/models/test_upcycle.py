"""An upcycled model computes what the dense one did, for every family, tower and pattern of layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Olmo2Config, PreTrainedModel

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import upcycle
from moe_lvlm.moe.upcycle import moe_layers
from tests.tiny_models import (
    TEXT_CONFIGS,
    TOWERS,
    collate,
    shake,
    tiny_causal_lm,
    tiny_llava,
    tiny_moe_llava,
    tiny_sample,
    tiny_samples,
)

LTDR = {"kind": "ltdr"}
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def moe(**fields: Any) -> MoEConfig:
    return MoEConfig.model_validate({"layers": "dense", "num_experts": 4, "top_k": 2} | fields)


def inputs(*, has_images: bool = True) -> dict[str, Tensor]:
    samples = tiny_samples() if has_images else [tiny_sample(0, words, seed=words) for words in (9, 4, 6)]
    batch = collate(samples, extra_padding=2)
    batch.pop("labels")
    return batch


def logits_and_states(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits and all hidden states at the positions that are not padding."""
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, use_cache=False)
    return [tensor[is_token] for tensor in (output.logits, *output.hidden_states)]


def assert_same(values: list[Tensor], expected: list[Tensor]) -> None:
    for value, other in zip(values, expected, strict=True):
        assert_close(value, other, **TOLERANCE)


def sure_routers(model: PreTrainedModel) -> PreTrainedModel:
    """Routers that tell tokens apart, so that weights are far from even; experts stay alike."""
    for index, (_, layer) in enumerate(moe_layers(model)):
        shake(layer.router, scale=0.5, seed=index)
    return model


@pytest.mark.parametrize("has_images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("family", list(TEXT_CONFIGS))
def test_every_family(family: str, has_images: bool) -> None:
    dense, batch = tiny_llava(family), inputs(has_images=has_images)
    # the dense model runs first: transformers installs its recording hooks on the layers that are then replaced
    expected = logits_and_states(dense, batch)
    assert len(expected) == 1 + 3 + 1
    sparse = sure_routers(upcycle(dense, moe(router=LTDR)))
    assert isinstance(sparse, MoELlavaForConditionalGeneration)
    assert len(moe_layers(sparse)) == 3
    for is_training in (False, True):
        assert_same(logits_and_states(sparse.train(is_training), batch), expected)
        counts = {
            count
            for _, decision in sparse(**batch, output_routing=True).routing.items()
            for count in decision.keep_RK.sum(dim=-1).tolist()
        }
        assert counts == ({0, 2, 4} if has_images else {0, 2})  # padding, head and tail are all there


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_hidden_states_of_a_model_that_never_ran_before(family: str) -> None:
    batch = inputs()
    sparse = upcycle(tiny_llava(family), moe())
    assert_same(logits_and_states(sparse, batch), logits_and_states(tiny_llava(family), batch))


@pytest.mark.parametrize("tower", list(TOWERS))
def test_every_tower(tower: str) -> None:
    batch = inputs()
    expected = logits_and_states(tiny_llava(tower=tower), batch)
    assert_same(logits_and_states(sure_routers(upcycle(tiny_llava(tower=tower), moe(router=LTDR))), batch), expected)


@pytest.mark.parametrize(
    ("layers", "expected_layers"),
    [
        ("sparse", [0, 2]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3]),
        ("dense", [0, 1, 2, 3]),
        ([3, 1], [1, 3]),
    ],
)
def test_every_pattern_of_layers(layers: Any, expected_layers: list[int]) -> None:
    batch = inputs()
    expected = logits_and_states(tiny_llava(num_hidden_layers=4), batch)
    sparse = sure_routers(upcycle(tiny_llava(num_hidden_layers=4), moe(layers=layers)))
    assert [name for name, _ in moe_layers(sparse)] == [f"model.language_model.layers.{i}.mlp" for i in expected_layers]
    assert [layer.site.layer for _, layer in moe_layers(sparse)] == expected_layers
    assert_same(logits_and_states(sparse, batch), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_k": 4},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 6, "top_k": 3, "router": {"kind": "ltdr", "tail_k": 5}},
        {"top_k": 1, "router": LTDR},
    ],
    ids=str,
)
def test_every_count(fields: dict[str, Any]) -> None:
    batch = inputs()
    expected = logits_and_states(tiny_llava(), batch)
    sparse = sure_routers(upcycle(tiny_llava(), moe(**fields)))
    for is_training in (False, True):
        assert_same(logits_and_states(sparse.train(is_training), batch), expected)


@pytest.mark.parametrize("family", list(TEXT_CONFIGS))
def test_causal_language_model_alone(family: str) -> None:
    batch = inputs(has_images=False)
    expected = logits_and_states(tiny_causal_lm(family), batch)
    dense = tiny_causal_lm(family)
    sparse = sure_routers(upcycle(dense, moe(router=LTDR)))
    assert sparse is dense
    assert len(moe_layers(sparse)) == 3
    assert_same(logits_and_states(sparse, batch), expected)


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("phi", {"resid_pdrop": 0.3}),
        ("phi3", {"resid_pdrop": 0.3}),
        ("stablelm", {"hidden_dropout": 0.3}),
        ("stablelm_parallel", {"hidden_dropout": 0.3}),
    ],
)
def test_dropout_falls_where_the_dense_model_has_it(family: str, dropout: dict[str, Any]) -> None:
    # routing draws no random number, so the same seed must drop the same elements
    batch = inputs()
    results = []
    for model in (tiny_llava(family, **dropout), upcycle(tiny_llava(family, **dropout), moe())):
        torch.manual_seed(5)
        results.append(logits_and_states(model.train(), batch))
    assert_same(results[1], results[0])
    assert (results[0][0] - logits_and_states(tiny_llava(family, **dropout), batch)[0]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_shared_experts_are_copies_that_are_added(family: str) -> None:
    dense = tiny_llava(family)
    ffn = copy.deepcopy(dense.model.language_model.layers[0].mlp)
    sparse = upcycle(dense, moe(shared_experts=2))
    _, layer = moe_layers(sparse)[0]
    assert layer.shared_experts is not None
    assert len(layer.shared_experts) == 2
    for shared in layer.shared_experts:
        assert type(shared) is type(ffn)
        for name, parameter in ffn.named_parameters():
            assert torch.equal(shared.get_parameter(name), parameter)
    assert len({id(p) for shared in layer.shared_experts for p in shared.parameters()}) == 2 * len(
        list(ffn.parameters())
    )
    # each of the two, and the routed experts together, are the dense FFN
    x_BSD = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert_close(layer(x_BSD), 3 * ffn(x_BSD), **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_fine_grained_slices_that_a_token_uses_all_are_the_dense_model_over_m(family: str) -> None:
    # With all m slices chosen, renormalised weights sum to 1 and not to m. Even weights (a gate of 0) give FFN / m.
    dense = tiny_llava(family)
    ffn = copy.deepcopy(dense.model.language_model.layers[0].mlp)
    sparse = upcycle(dense, moe(num_experts=4, top_k=4, fine_grained=4))
    _, layer = moe_layers(sparse)[0]
    nn.init.zeros_(layer.router.gate.weight)
    x_BSD = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert_close(layer(x_BSD), ffn(x_BSD) / 4, **TOLERANCE)


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_a_model_built_from_the_configuration_holds_the_same_tensors(family: str) -> None:
    sparse = upcycle(tiny_llava(family), moe(layers="sparse", shared_experts=1, router=LTDR))
    built = MoELlavaForConditionalGeneration(sparse.config)
    expected = {name: tuple(tensor.shape) for name, tensor in sparse.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == expected


def test_configuration_tells_the_mixture() -> None:
    config = moe(layers=(0, 2), router=LTDR)
    sparse = upcycle(tiny_llava(), config)
    assert sparse.config.moe_config == config
    assert sparse.config.model_type == "moe_llava"
    assert sparse.config.with_moe(None).moe is None
    assert sparse.config.moe_config == config


def test_save_and_from_pretrained(tmp_path: Any) -> None:
    sparse = tiny_moe_llava(moe(router=LTDR))
    sparse.save_pretrained(tmp_path)
    loaded, report = MoELlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    batch = inputs()
    assert_same(logits_and_states(loaded.eval(), batch), logits_and_states(sparse, batch))


def test_tied_embeddings_stay_tied() -> None:
    batch = inputs()
    expected = logits_and_states(tiny_llava(tie_word_embeddings=True), batch)
    sparse = upcycle(tiny_llava(tie_word_embeddings=True), moe())
    assert sparse.lm_head.weight is sparse.get_input_embeddings().weight
    assert_same(logits_and_states(sparse, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_new_parts_have_the_type_of_the_dense_ffn(dtype: torch.dtype) -> None:
    sparse = upcycle(tiny_llava().to(dtype), moe(shared_experts=1))
    assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}


def test_frozen_tower_and_mode_are_kept() -> None:
    dense = tiny_llava()
    dense.model.vision_tower.requires_grad_(False)
    sparse = upcycle(dense.train(), moe())
    assert sparse.training
    # a frozen tower stays as in evaluation
    tower = set(sparse.model.vision_tower.modules())
    assert all(module.training != (module in tower) for module in sparse.modules())
    assert not any(parameter.requires_grad for parameter in sparse.model.vision_tower.parameters())
    assert all(parameter.requires_grad for _, layer in moe_layers(sparse) for parameter in layer.parameters())


def small_language_model(config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)


UNKNOWN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "name"),
    [(Gemma2Config(**UNKNOWN), "Gemma2DecoderLayer"), (Olmo2Config(**UNKNOWN), "Olmo2DecoderLayer")],
    ids=["gemma2", "olmo2"],
)
def test_unknown_layers_are_refused(config: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"decoder layer {name} with parts .*allowed: LlamaDecoderLayer"):
        upcycle(small_language_model(config), moe())


def test_a_model_without_decoder_layers_is_refused() -> None:
    model = small_language_model(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=64))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no decoder layers at `transformer\.layers`"):
        upcycle(model, moe())


def test_a_refused_model_is_left_as_it_was() -> None:
    dense, batch = tiny_llava(), inputs()
    expected = logits_and_states(dense, batch)
    dense.model.language_model.layers[2].add_module("adapter", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaDecoderLayer with parts"):
        upcycle(dense, moe())
    assert not moe_layers(dense)
    assert_same(logits_and_states(dense, batch), expected)


def test_upcycling_twice_is_refused() -> None:
    sparse = upcycle(tiny_llava(), moe())
    with pytest.raises(ValueError, match="MoELlavaForConditionalGeneration has mixture-of-experts layers already"):
        upcycle(sparse, moe())


def test_fine_grained_that_does_not_divide_the_width_is_refused() -> None:
    # 48 is not a multiple of 5
    with pytest.raises(ValueError, match=r"fine_grained: 5 does not divide the FFN's width \(48\)"):
        upcycle(tiny_llava(), moe(num_experts=5, fine_grained=5))


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="layers: 3 is not a layer of this model; allowed: 0 to 2"):
        upcycle(tiny_llava(), moe(layers=(1, 3)))


def test_a_mixture_without_any_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="layers"):
        upcycle(tiny_llava(num_hidden_layers=1), moe(layers="first_half"))
