"""Which layers compute their activations again, and that it changes nothing but how often they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.moe.checkpointing import choose_layers
from moe_lvlm.training.checkpointing import enable_checkpointing
from tests.tiny_models import blip_batch, collate, tiny_moe_blip, tiny_moe_llava, tiny_samples

NUM_LAYERS = 4


def sparse_model() -> MoELlavaForConditionalGeneration:
    """Layers 0 and 2 are sparse."""
    return tiny_moe_llava(MoEConfig(layers="sparse", num_experts=4), num_hidden_layers=NUM_LAYERS).train()


def runs_and_gradients(wanted: bool | int) -> tuple[list[int], dict[str, Tensor]]:
    """How often each layer's attention runs in a step, and the gradients."""
    model = sparse_model()
    enable_checkpointing(model, wanted)
    runs = [0] * NUM_LAYERS

    def count(place: int) -> None:
        runs[place] += 1

    for place, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.register_forward_hook(lambda *_, place=place: count(place))
    model(**collate(tiny_samples()), use_cache=False).loss.backward()
    return runs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("wanted", "again"),
    [(False, set()), (1, {3}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (True, {0, 1, 2, 3})],
)
def test_layers_without_experts_come_first_from_the_last(wanted: bool | int, again: set[int]) -> None:
    plain = runs_and_gradients(False)[1]
    runs, found = runs_and_gradients(wanted)
    assert runs == [2 if layer in again else 1 for layer in range(NUM_LAYERS)]
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("num_layers", [0, 5])
def test_a_number_that_no_model_has(num_layers: int) -> None:
    layers = sparse_model().language_layers()
    with pytest.raises(ValueError, match=f"train.gradient_checkpointing: {num_layers}; allowed: .* 1 to 4"):
        choose_layers(layers, num_layers)


@pytest.mark.parametrize("text", ["llama", "t5"])
def test_a_number_is_of_the_language_model_alone(text: str) -> None:
    model, batch = tiny_moe_blip(None, text).train(), blip_batch(text)
    enable_checkpointing(model, 1)
    chosen = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
    # the last layer, and of T5 the encoder's too; stacks carry the switch of their layers
    layers = [name for name in chosen if name.rpartition(".")[2].isdigit()]
    assert len(layers) == (2 if text == "t5" else 1)
    last = f".{len(model.language_layers()) - 1}"
    assert all(name.endswith(last) and name.startswith("language_model") for name in layers)
    model(**batch, use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
