"""Which decoder layers can become sparse."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import Gemma2Config, Olmo2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer

from moe_lvlm.moe.decoder import FAMILIES, find_family
from tests.tiny_models import TEXT_CONFIGS, tiny_causal_lm

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
ALLOWED = (
    "allowed: LlamaDecoderLayer, MistralDecoderLayer, Phi3DecoderLayer, PhiDecoderLayer, Qwen2DecoderLayer, "
    "Qwen3DecoderLayer, StableLmDecoderLayer"
)


def dense_layer(family: str) -> nn.Module:
    return tiny_causal_lm(family, num_hidden_layers=1).base_model.layers[0]


@pytest.mark.parametrize("family", list(TEXT_CONFIGS))
def test_each_family_is_known_and_keeps_its_class(family: str) -> None:
    layer = dense_layer(family)
    found = find_family(layer)
    assert found.dense is type(layer)
    assert issubclass(found.moe, type(layer))


def test_each_family_has_a_tiny_model() -> None:
    assert len(FAMILIES) == len(TEXT_CONFIGS)


def test_other_norms_are_refused() -> None:
    # Gemma-2 has four norms, OLMo-2 norms what comes out of attention and FFN
    layers = (Gemma2DecoderLayer(Gemma2Config(**SMALL), 0), Olmo2DecoderLayer(Olmo2Config(**SMALL), 0))
    for layer in layers:
        with pytest.raises(ValueError, match=type(layer).__name__) as raised:
            find_family(layer)
        assert ALLOWED in str(raised.value)


def test_a_child_too_many_is_refused() -> None:
    layer = dense_layer("llama")
    layer.add_module("adapter", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer with parts \['adapter', "):
        find_family(layer)


def test_a_child_too_few_is_refused() -> None:
    layer = dense_layer("llama")
    del layer.post_attention_layernorm
    with pytest.raises(ValueError, match="LlamaDecoderLayer with parts"):
        find_family(layer)


def test_an_ffn_of_another_layout_is_refused() -> None:
    layer = dense_layer("llama")
    layer.get_submodule("mlp").add_module("extra_proj", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LlamaDecoderLayer"):
        find_family(layer)


def test_a_subclass_of_a_known_layer_is_refused() -> None:
    layer = dense_layer("llama")

    class Changed(type(layer)):  # type: ignore[misc]
        """Might compute anything."""

    layer.__class__ = Changed
    with pytest.raises(ValueError, match="decoder layer Changed"):
        find_family(layer)
