"""Features in the place of images: the same losses and gradients without the tower; and what a frozen tower leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import InstructBlipQFormerConfig

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.tower import tower_features
from moe_lvlm.models.tower_facts import tower_facts
from moe_lvlm.models.upcycle import as_moe_llava
from moe_lvlm.training.features import feature_choice, vision_tower
from moe_lvlm.training.trainable import select_trainable
from tests.tiny_models import (
    IMAGE_SIZE,
    TOWERS,
    blip_batch,
    collate,
    tiny_llava,
    tiny_moe_blip,
    tiny_moe_llava,
    tiny_sample,
    tiny_samples,
)

Model = MoELlavaForConditionalGeneration | MoEInstructBlipForConditionalGeneration
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20,
    "max_position_embeddings": 16, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def dense(tower: str = "clip") -> Model:
    return as_moe_llava(tiny_llava(tower=tower))


def deep_features() -> Model:
    """Of two hidden states side by side, of which neither is the last."""
    model = as_moe_llava(tiny_llava())
    model.config.vision_feature_layer = [0, -2]
    linear = model.model.multi_modal_projector.linear_1
    model.model.multi_modal_projector.linear_1 = nn.Linear(2 * linear.in_features, linear.out_features)
    return model


def sparse() -> Model:
    config = {"num_experts": 4, "top_k": 2, "router": {"kind": "ltdr"}, "balance": {"coefficient": 0.1}}
    return tiny_moe_llava(MoEConfig.model_validate(config))


def q_former(family: str = "llama") -> Model:
    """LLaVA around a Q-Former that makes 4 tokens of an image, as its patches are."""
    stock = tiny_llava(family)
    model = as_moe_llava(stock)
    config = model.config
    config.qformer = InstructBlipQFormerConfig(**QFORMER).to_dict()
    config.num_query_tokens = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = MoELlavaForConditionalGeneration(config)
    made.load_state_dict(model.state_dict(), strict=False)
    return made


def blip(text: str) -> Model:
    settings = ExpertSettings.model_validate({"num_layers": 2, "importance_coefficient": 0.1, "noise": 0.0})
    return tiny_moe_blip(settings, text)


def llava_batch(*, has_words: bool = False) -> dict[str, Any]:
    batch: dict[str, Any] = collate(tiny_samples())
    if has_words:
        batch["qformer_input_ids"] = torch.arange(1, 13).view(4, 3) % 20
        batch["qformer_attention_mask"] = torch.ones(4, 3, dtype=torch.int64)
    return batch


HOSTS: dict[str, tuple[Callable[[], Model], Callable[[], dict[str, Any]]]] = {
    **{f"llava {tower}": (lambda tower=tower: dense(tower), llava_batch) for tower in TOWERS},
    "llava of two layers": (deep_features, llava_batch),
    "sparse llava": (sparse, llava_batch),
    "llava with a Q-Former": (q_former, lambda: llava_batch(has_words=True)),
    "instructblip": (lambda: blip("llama"), blip_batch),
    "instructblip t5": (lambda: blip("t5"), lambda: blip_batch("t5")),
}


def prepare(model: Model, *, trains: tuple[str, ...] = ("connector",)) -> Model:
    select_trainable(model, trains)
    return model.train()


def with_features(model: Model, batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch with what the tower makes of its images."""
    layer, select = feature_choice(model.config)
    with torch.inference_mode():
        pixels = batch["pixel_values"].to(model.dtype)
        features = tower_features(vision_tower(model), pixels, layer=layer, select=select)
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    return rest | {"image_features": features.clone()}


def forbid_tower(model: Model) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the tower was called")

    vision_tower(model).register_forward_pre_hook(refuse)


def step(model: Model, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def distance(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over that of what is expected; that of a gradient of 0 but for rounding counts as 0."""
    length = float(expected.float().norm())
    return float((found.float() - expected.float()).norm()) / length if length > 1e-5 else 0.0


@pytest.mark.parametrize("host", list(HOSTS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_loss_and_gradients(host: str, precision: str) -> None:
    make, make_batch = HOSTS[host]
    model = prepare(make())
    batch = make_batch()
    exact_loss, exact = step(model, batch)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    loss, grads = step(model, batch)
    cached = with_features(model, batch)
    forbid_tower(model)
    found_loss, found = step(model, cached)
    assert grads
    assert found.keys() == grads.keys()
    if precision == "fp32":  # the same operations on the same numbers
        assert torch.equal(found_loss, loss)
        for name, grad in grads.items():
            assert torch.equal(found[name], grad), name
        return
    # a product with features without the class token's gap between images is rounded in another order: no worse
    assert_close(found_loss.float(), exact_loss, rtol=2e-2, atol=0)
    for name, grad in grads.items():
        assert distance(found[name], exact[name]) <= 1.5 * distance(grad, exact[name]) + 1e-2, name


@pytest.mark.parametrize("host", ["llava clip", "llava with a Q-Former", "instructblip"])
def test_features_rounded_to_bf16(host: str) -> None:
    make, make_batch = HOSTS[host]
    model = prepare(make())
    batch = make_batch()
    loss, grads = step(model, batch)
    cached = with_features(model, batch)
    cached["image_features"] = cached["image_features"].to(torch.bfloat16)
    found_loss, found = step(model, cached)
    assert_close(found_loss, loss, rtol=2e-2, atol=0)
    assert not torch.equal(found_loss, loss)
    for name, grad in grads.items():
        assert distance(found[name], grad) <= 5e-2, name


@pytest.mark.parametrize("host", ["llava clip", "llava with a Q-Former", "instructblip"])
def test_without_images_the_connector_runs_and_the_tower_does_not(host: str) -> None:
    make, _ = HOSTS[host]
    model = prepare(make(), trains=("connector", "language_model"))
    words: dict[str, Any] = collate([tiny_sample(0, 6, seed=1), tiny_sample(0, 4, seed=2)])
    loss, grads = step(model, words)  # runs the tower on a blank image
    shape = with_features(model, {"pixel_values": torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)})["image_features"].shape
    forbid_tower(model)
    found_loss, found = step(model, words | {"image_features": torch.empty(0, *shape[1:])})
    assert torch.equal(found_loss, loss)
    assert found.keys() == grads.keys()
    connector = [
        name for name in found if name.startswith(("model.multi_modal_projector.", "model.connector.", "qformer."))
    ]
    assert connector
    for name, grad in grads.items():
        assert torch.equal(found[name], grad), name
        assert name not in connector or not grad.any(), name
    # outside of training nothing has to run
    model.eval()
    with torch.no_grad():
        empty = model(**words, image_features=torch.empty(0, *shape[1:])).logits
        assert torch.equal(empty, model(**words).logits)


def test_mistakes_are_named() -> None:
    model = prepare(dense())
    batch = llava_batch()
    cached = with_features(model, batch)
    with pytest.raises(ValueError, match="image_features go with input_ids, and in the place of pixel_values"):
        model(**batch, image_features=cached["image_features"])
    with pytest.raises(ValueError, match="tokens: 16, features: 12"):
        model(**cached | {"image_features": cached["image_features"][:, :3]})
    blip_model = prepare(blip("llama"))
    with_words = with_features(blip_model, blip_batch())
    with pytest.raises(ValueError, match="in the place of pixel_values"):
        blip_model(**blip_batch(), image_features=with_words["image_features"])
    with pytest.raises(ValueError, match="4 images, but no qformer_input_ids"):
        blip_model(**with_words | {"qformer_input_ids": None})


def saved_bytes(model: Model, run: Callable[[Model], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of what `run` computes, parameters not among them."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run(model)
    assert output.numel()
    return sum(kept.values())


def images_of(model: Model) -> Tensor:
    """The visual tokens of two images."""
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    inputs = {}
    if isinstance(model, MoEInstructBlipForConditionalGeneration) or model.model.connector is not None:
        inputs = {"qformer_input_ids": torch.ones(2, 3, dtype=torch.int64)}
    tokens = model.get_image_features(pixels, **inputs).pooler_output
    return tokens if isinstance(tokens, Tensor) else torch.cat(tokens)


@pytest.mark.parametrize("host", list(HOSTS))
def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(host: str) -> None:
    model = prepare(HOSTS[host][0](), trains=("language_model",))
    assert saved_bytes(model, images_of) == 0


def test_under_a_trained_projector_its_own_inputs_alone_are_kept() -> None:
    model = prepare(dense())
    # of 2 images x 4 patches in float32: what goes into linear_1, GELU and linear_2
    width, hidden = 16, 32
    kept = saved_bytes(model, images_of)
    assert kept == 2 * 4 * (width + hidden + hidden) * 4
    assert saved_bytes(prepare(dense(), trains=("connector", "vision_tower")), images_of) > 5 * kept


@pytest.mark.parametrize("host", ["llava clip", "instructblip"])
def test_a_frozen_tower_has_no_dropout(host: str) -> None:
    model = HOSTS[host][0]()
    for module in vision_tower(model).modules():
        for name in ("dropout", "attention_dropout"):  # CLIP's attention calls it so, InstructBLIP's otherwise
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    prepare(model, trains=("connector",))
    assert torch.equal(images_of(model), images_of(model))
    prepare(model, trains=("connector", "vision_tower"))
    assert not torch.equal(images_of(model), images_of(model))
    assert model.eval().training is False
    assert model.train().training is True


def test_gradient_checkpointing_leaves_the_tower_alone() -> None:
    for host in ("llava clip", "instructblip"):
        model = prepare(HOSTS[host][0]())
        for module in model.checkpointed_modules():
            module.gradient_checkpointing_enable({"use_reentrant": False})
        tower = vision_tower(model)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())


def test_facts_of_a_tower_change_with_it() -> None:
    tower = vision_tower(dense())
    facts = tower_facts(tower)
    assert facts == tower_facts(vision_tower(dense()))
    with torch.no_grad():
        next(tower.parameters()).view(-1)[0] += 1e-6
    changed = tower_facts(tower)
    assert {name for name in facts if facts[name] != changed[name]} == {"weights"}
    assert tower_facts(tower.to(torch.bfloat16))["precision"] == "torch.bfloat16"
    tower.config.hidden_act = "relu"
    assert tower_facts(tower)["hidden_act"] == "relu"
