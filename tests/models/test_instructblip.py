"""InstructBLIP with a Q-Former or a Q-MoE, for three kinds of language model: against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.connectors.upcycle import experts_of
from moe_lvlm.models.build import build_empty, config_of, open_weights
from moe_lvlm.models.config import with_fields
from moe_lvlm.models.connectors import image_draws
from moe_lvlm.models.context import derive_context
from moe_lvlm.models.instructblip import MoEInstructBlipForConditionalGeneration
from moe_lvlm.models.weights import load_weights
from moe_lvlm.routing.types import CONNECTOR, Site
from tests.tiny_models import BLIP_TEXT_CONFIGS, IMAGE_ID, blip_batch, blip_rows, tiny_blip, tiny_moe_blip

TEXTS = sorted(BLIP_TEXT_CONFIGS)
SETTINGS = ExpertSettings(num_layers=2)
INPUTS = ("input_ids", "attention_mask", "pixel_values", "qformer_input_ids", "qformer_attention_mask")


def inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What transformers' own model knows."""
    return {name: batch[name] for name in INPUTS}


def decoder_inputs(text: str, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The decoder's tokens, start first, of an encoder-decoder model."""
    if text != "t5":
        return {}
    return {"decoder_input_ids": torch.cat((torch.zeros_like(batch["labels"][:, :1]), batch["labels"][:, 1:]), dim=1)}


def rows(batch: dict[str, Any], *chosen: int) -> dict[str, Tensor]:
    return {name: value[list(chosen)] for name, value in inputs(batch).items()}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "settings", [None, *(SETTINGS.model_copy(update={"normalize_output": True, "router": r}) for r in ("cross", "pre"))]
)
def test_loads_the_published_layout_and_computes_the_same(
    text: str, settings: ExpertSettings | None, tmp_path: Path
) -> None:
    """Also with experts, which begin as copies of the query FFN."""
    stock, batch = tiny_blip(text), blip_batch(text)
    stock.save_pretrained(tmp_path)
    experts = None if settings is None else settings.model_dump(mode="json")
    model = build_empty(with_fields(config_of(tmp_path), experts=experts))
    load_weights(model, open_weights(tmp_path), router_seed=3)
    model.eval()
    with torch.no_grad():
        expected = stock(**inputs(batch), **decoder_inputs(text, batch)).logits
        assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        answers = stock.generate(**inputs(batch), max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**inputs(batch), max_new_tokens=5, do_sample=False), answers)


@pytest.mark.parametrize("text", TEXTS)
def test_the_loss_is_that_of_transformers(text: str) -> None:
    stock, model, batch = tiny_blip(text), tiny_moe_blip(None, text), blip_batch(text)
    labels = batch["labels"][:, 1:].contiguous() if text == "t5" else batch["labels"]
    expected = stock(**inputs(batch), labels=labels).loss
    output = model(**batch)
    assert_close(output.loss, expected)
    assert output.balance_loss is None
    supervised = (batch["labels"][:, 1:] != -100).sum()
    assert_close(model(**batch, num_items_in_batch=2 * supervised).loss, expected / 2)


def test_names_of_a_plain_q_former_are_instructblips() -> None:
    assert tiny_moe_blip(None).state_dict().keys() == tiny_blip().state_dict().keys()


@pytest.mark.parametrize("text", TEXTS)
def test_gradients_reach_the_connector_only(text: str) -> None:
    """Everything of it, with tower and language model frozen."""
    model = tiny_moe_blip(SETTINGS, text).train()
    for part in (model.vision_model, model.language_model):
        part.requires_grad_(False)
    output = model(**blip_batch(text))
    assert_close(output.loss, output.language_loss + output.balance_loss)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        is_last_text = ".layer.3." in name and (".3.intermediate." in name or ".3.output." in name)
        if name.startswith(("vision_model.", "language_model.")):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None or is_last_text, name


def test_the_importance_loss_is_its_coefficient_times_that_of_the_trace() -> None:
    batch = blip_batch()
    model = tiny_moe_blip(SETTINGS.model_copy(update={"importance_coefficient": 0.5})).train()
    output = model(**batch, output_routing=True)
    total = 0.0
    for layer in (2, 3):
        probs = output.routing[Site(CONNECTOR, layer)].probs_RE.double().sum(dim=0)
        total += float(((probs - probs.mean()) ** 2).mean() / probs.mean() ** 2) / 2
    assert float(output.balance_loss) == pytest.approx(0.5 * total, rel=1e-5)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("is_training", [False, True])
def test_a_sample_does_not_depend_on_its_batch(text: str, is_training: bool) -> None:
    """In training with noise: it is drawn by sample."""
    model, batch = tiny_moe_blip(SETTINGS, text).train(is_training), blip_batch(text)
    summed = {"num_items_in_batch": torch.tensor(1.0)}
    together = model(**batch, **summed, output_routing=True)
    losses = []
    for row in range(4):
        output = model(**blip_rows(batch, row, row + 1), **summed, output_routing=True)
        losses.append(output.language_loss)
        is_token = batch["labels"][row] != -100
        if not is_training:
            assert_close(output.logits[0][is_token], together.logits[row][is_token], rtol=1e-4, atol=1e-5)
        for site, decision in output.routing.items():
            assert_close(decision.weights_RK[0], together.routing[site].weights_RK[row])
    assert_close(torch.stack(losses).sum(), together.language_loss, rtol=1e-4, atol=1e-5)


def test_noise_moves_the_gates_in_training_and_not_in_evaluation() -> None:
    model, batch = tiny_moe_blip(SETTINGS), blip_batch()

    def weights() -> Tensor:
        return torch.cat([decision.weights_RK for _, decision in model(**batch, output_routing=True).routing.items()])

    quiet, noisy = weights(), (model.train(), weights())[1]
    assert not torch.equal(quiet, noisy)
    assert torch.equal(noisy, weights())
    assert torch.equal(quiet, (model.eval(), weights())[1])


@pytest.mark.parametrize("text", TEXTS)
def test_a_batch_without_an_image_runs_the_same_modules(text: str) -> None:
    """The blank image adds nothing and counts nowhere."""
    model = tiny_moe_blip(SETTINGS, text)
    batch = blip_batch(text)
    words = {"input_ids": batch["input_ids"][:, 3:], "attention_mask": batch["attention_mask"][:, 3:]}
    words["labels"] = batch["labels"] if text == "t5" else batch["labels"][:, 3:]
    calm = model(**words).language_loss
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model.train()
    output = model(**words, output_routing=True)
    text_only = called[:]
    called.clear()
    model(**batch)
    assert sorted(text_only) == sorted(called)
    assert_close(output.language_loss, calm)
    assert float(output.balance_loss) == 0
    assert not any(decision.keep_RK.any() for _, decision in output.routing.items())
    output.loss.backward()
    assert all(
        layer.router.state_dict() and p.grad is not None
        for _, layer in experts_of(model)
        for p in layer.router.parameters()
    )
    assert float(model.query_tokens.grad.abs().max()) == 0


@pytest.mark.parametrize("text", ["llama", "t5"])
def test_gradient_checkpointing_changes_nothing(text: str) -> None:
    batch = blip_batch(text)

    def gradients(*, checkpointed: bool) -> dict[str, Tensor]:
        model = tiny_moe_blip(SETTINGS, text).train()
        for module in model.checkpointed_modules() if checkpointed else ():
            module.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(checkpointed=False)
    other = gradients(checkpointed=True)
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        assert_close(other[name], gradient, msg=name)


def test_two_images_of_a_sample_have_draws_of_their_own() -> None:
    ids = torch.tensor([[IMAGE_ID] * 6 + [5], [5] * 7, [IMAGE_ID] * 3 + [5] * 4])
    context = derive_context(ids, attention_mask=None, image_token_id=IMAGE_ID, num_images=3)
    draws = image_draws(replace(context, draw_N=torch.tensor([10, 20, 30])), 3)
    assert draws is not None
    assert draws[0] == 10 and draws[2] == 30
    assert len(set(draws.tolist())) == 3
    assert image_draws(context, 3) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("qformer_input_ids"), "no qformer_input_ids"),
        (lambda batch: batch.pop("input_ids"), "input_ids are needed"),
        (lambda batch: batch.pop("pixel_values"), "hold image tokens, but no pixel_values"),
        (lambda batch: batch.update(pixel_values=batch["pixel_values"][:3]), "12 image tokens|4 rows for 3 images"),
    ],
)
def test_wrong_inputs(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    batch = inputs(blip_batch())
    change(batch)
    with pytest.raises(ValueError, match=message):
        tiny_moe_blip(SETTINGS)(**batch)


def test_saves_and_loads_experts(tmp_path: Path) -> None:
    model, batch = tiny_moe_blip(SETTINGS), blip_batch()
    model.save_pretrained(tmp_path)
    config = config_of(tmp_path)
    assert config.expert_settings == SETTINGS
    other = build_empty(config)
    load_weights(other, open_weights(tmp_path))
    assert isinstance(other, MoEInstructBlipForConditionalGeneration)
    with torch.no_grad():
        assert torch.equal(other.eval()(**batch).logits, model(**batch).logits)
