"""The sparse vision-language model: its losses, its routing, checkpointing, batches of every make-up, generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlavaForConditionalGeneration
from transformers.loss.loss_utils import ForCausalLMLoss

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.context import derive_context
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import upcycle
from moe_lvlm.moe.upcycle import moe_layers
from moe_lvlm.routing.types import Modality, Site
from tests.tiny_models import (
    BOS_ID,
    HIDDEN,
    IMAGE_ID,
    IMAGE_SIZE,
    IMAGE_TOKENS,
    PAD_ID,
    VOCABULARY,
    TinySample,
    collate,
    shake,
    tiny_llava,
    tiny_moe_llava,
    tiny_sample,
    tiny_samples,
)

COEFFICIENT = 0.1


def moe(**fields: Any) -> MoEConfig:
    """LTDR in every layer, with a balance loss large enough to be seen."""
    defaults = {
        "layers": "dense",
        "num_experts": 4,
        "top_k": 2,
        "router": {"kind": "ltdr"},
        "balance": {"coefficient": COEFFICIENT, "on": ["language"]},
    }
    return MoEConfig.model_validate(defaults | fields)


def sparse_model(family: str = "llama", **fields: Any) -> MoELlavaForConditionalGeneration:
    return tiny_moe_llava(moe(**fields), family)


def gradients(model: MoELlavaForConditionalGeneration) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_and_gradients(
    model: MoELlavaForConditionalGeneration, batch: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), gradients(model)


# ---------------------------------------------------------------------------------------------------------- losses


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def test_losses_by_their_definition() -> None:
    model, batch = sparse_model().train(), collate(tiny_samples())
    output = model(**batch, output_routing=True)
    # next-token cross entropy over the supervised tokens
    assert output.logits is None  # of the supervised positions alone
    logits, labels = model(**without_labels(batch)).logits[:, :-1], batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    assert_close(output.language_loss, expected)
    # K sum F_i G_i over language tokens, summed over layers
    is_language = ((batch["input_ids"] != IMAGE_ID) & (batch["attention_mask"] == 1)).flatten()
    balance = 0.0
    for layer in range(3):
        probs = output.routing[Site("language_model", layer)].probs_RE[is_language]
        fraction = torch.bincount(probs.argmax(dim=-1), minlength=4) / len(probs)
        balance += 4 * (fraction * probs.mean(dim=0)).sum()
    assert_close(output.balance_loss, COEFFICIENT * balance)
    assert_close(output.loss, output.language_loss + output.balance_loss)
    assert output.balance_loss.item() > 0.05


def test_divisor_given_by_the_step() -> None:
    model, batch = sparse_model().train(), collate(tiny_samples())
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    own = model(**batch)
    of_step = model(**batch, num_items_in_batch=torch.tensor(5 * supervised))
    assert_close(of_step.language_loss, own.language_loss / 5)
    assert_close(of_step.balance_loss, own.balance_loss)


def test_the_head_computes_supervised_positions_alone() -> None:
    """In training; loss and gradients are those of transformers' loss over all logits."""
    model, batch = sparse_model().train(), collate(tiny_samples())
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].numel() // HIDDEN))
    logits = model(**without_labels(batch)).logits
    expected = ForCausalLMLoss(logits, batch["labels"], VOCABULARY)
    expected.backward()
    expected_gradients = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    found = model(**batch).language_loss
    found.backward()
    assert rows == [batch["labels"].numel(), int((batch["labels"][:, 1:] != -100).sum())]
    assert_close(found, expected)
    assert gradients(model).keys() == expected_gradients.keys()
    for name, grad in gradients(model).items():
        assert_close(grad, expected_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_without_a_supervised_token_has_loss_zero() -> None:
    model, batch = sparse_model().train(), collate(tiny_samples())
    batch["labels"][:] = -100
    output = model(**batch)
    assert output.language_loss.item() == 0.0
    assert output.loss.isfinite()


def test_without_labels_there_is_no_loss() -> None:
    batch = collate(tiny_samples())
    batch.pop("labels")
    output = sparse_model()(**batch)
    assert output.loss is None
    assert output.language_loss is None
    assert output.balance_loss is None
    assert output.routing is None


def test_dense_model_of_ours_equals_that_of_transformers() -> None:
    dense, batch = tiny_llava(), collate(tiny_samples())
    ours = MoELlavaForConditionalGeneration.from_pretrained(
        None, config=_dense_config(dense), state_dict=dense.state_dict()
    ).eval()
    output, expected = ours(**batch, output_routing=True), dense(**batch)
    assert_close(output.logits, expected.logits)
    assert_close(output.loss, expected.loss)
    assert output.balance_loss is None
    assert output.routing is None


def _dense_config(dense: LlavaForConditionalGeneration) -> MoELlavaConfig:
    return MoELlavaConfig.from_dict(dense.config.to_dict() | {"model_type": "moe_llava"})


# --------------------------------------------------------------------------------------------------------- routing


def test_trace_has_every_layer_and_the_modality_of_every_token() -> None:
    batch = collate(tiny_samples())
    trace = sparse_model(layers=[0, 2])(**batch, output_routing=True).routing
    assert [site for site, _ in trace.items()] == [Site("language_model", 0), Site("language_model", 2)]
    expected = torch.where(batch["input_ids"] == IMAGE_ID, int(Modality.VISION), int(Modality.LANGUAGE))
    expected[batch["attention_mask"] == 0] = int(Modality.PADDING)
    assert trace.context.modality_BS.tolist() == expected.tolist()


def test_context_given_is_the_context_used() -> None:
    model, batch = sparse_model(), collate(tiny_samples())
    derived = derive_context(
        batch["input_ids"], attention_mask=batch["attention_mask"], image_token_id=IMAGE_ID, num_images=4
    )
    assert_close(model(**batch, routing=derived).loss, model(**batch).loss)
    output = model(**batch, routing=derived, output_routing=True)
    assert output.routing.context is derived


def test_embeddings_without_a_context_are_refused() -> None:
    model = sparse_model()
    with pytest.raises(ValueError, match="needs input_ids, or a routing context beside inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 3, 32))


def test_each_call_has_a_trace_of_its_own() -> None:
    model, batch = sparse_model().train(), collate(tiny_samples())
    first = model(**batch, output_routing=True)
    second = model(**batch, output_routing=True)
    assert first.routing is not second.routing
    assert_close(first.balance_loss, second.balance_loss)


# --------------------------------------------------------------------------------- the same loss, whatever the batch


@pytest.mark.parametrize("family", ["llama", "stablelm_parallel"])
@pytest.mark.parametrize(
    "rearrange",
    [
        lambda samples: collate(samples, extra_padding=7),
        lambda samples: collate([samples[index] for index in (2, 0, 3, 1)]),
        lambda samples: collate([samples[index] for index in (1, 3, 2, 0)], extra_padding=3),
        lambda samples: collate(samples, extra_padding=2, side="left"),
    ],
    ids=["more padding", "another order", "both", "padding at the left"],
)
def test_padding_and_order_do_not_change_the_loss(
    family: str, rearrange: Callable[[list[TinySample]], dict[str, Tensor]]
) -> None:
    model = sparse_model(family).train()  # tails by batch scope
    loss, expected = loss_and_gradients(model, collate(tiny_samples()))
    moved_loss, moved = loss_and_gradients(model, rearrange(tiny_samples()))
    assert moved_loss == pytest.approx(loss, rel=1e-5)
    assert moved.keys() == expected.keys()
    for name, grad in moved.items():
        assert_close(grad, expected[name], atol=2e-5, rtol=1e-3, msg=name)


def test_micro_batches_of_a_text_and_an_image_sample_sum_to_their_batch() -> None:
    # With the divisor of the step and statistics of image scope, a batch is the sum of its samples.
    model = sparse_model(
        router={"kind": "ltdr", "tail_scope": "image"}, balance={"coefficient": 0.0, "on": ["language"]}
    ).train()
    divisor = torch.tensor(8)
    whole = model(**collate(tiny_samples()), num_items_in_batch=divisor).loss
    parts = sum(model(**collate([sample]), num_items_in_batch=divisor).loss for sample in tiny_samples())
    assert_close(parts, whole, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------- text-only in training


def test_text_only_batch_gives_the_projector_a_gradient_of_zero() -> None:
    model = sparse_model().train()
    batch = collate([tiny_sample(0, 6), tiny_sample(0, 4)])
    loss, grads = loss_and_gradients(model, batch)
    for name, _ in model.model.multi_modal_projector.named_parameters():
        assert grads[f"model.multi_modal_projector.{name}"].abs().sum() == 0
    assert grads["model.language_model.embed_tokens.weight"].abs().sum() > 0
    with torch.no_grad():
        assert model.eval()(**batch).loss.item() == pytest.approx(loss, rel=1e-6)


def test_text_only_batch_calls_the_modules_of_an_image_batch_in_the_same_order() -> None:
    model = sparse_model().train()
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    model(**collate([tiny_sample(1, 5)]))
    with_image = list(called)
    called.clear()
    model(**collate([tiny_sample(0, 5)]))
    assert called == with_image


def test_text_only_batch_with_frozen_embeddings_still_needs_a_gradient() -> None:
    model = sparse_model().train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model(**collate([tiny_sample(0, 5)])).language_loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.model.multi_modal_projector.parameters())


def test_images_give_the_projector_a_gradient() -> None:
    _, grads = loss_and_gradients(sparse_model().train(), collate(tiny_samples()))
    assert grads["model.multi_modal_projector.linear_1.weight"].abs().sum() > 0


# ------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("family", ["llama", "phi", "stablelm"])
def test_checkpointing_changes_no_gradient(family: str) -> None:
    batch = collate(tiny_samples())
    plain = sparse_model(family).train()
    loss, expected = loss_and_gradients(plain, batch)
    model = sparse_model(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forwards = _count_forwards(model)
    checkpointed_loss, grads = loss_and_gradients(model, batch)
    assert forwards == {name: 2 for name, _ in moe_layers(model)}  # it really ran again
    assert checkpointed_loss == pytest.approx(loss, rel=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def _count_forwards(model: MoELlavaForConditionalGeneration) -> dict[str, int]:
    forwards: dict[str, int] = {}
    for name, layer in moe_layers(model):

        def count(module: Any, args: Any, name: str = name) -> None:
            forwards[name] = forwards.get(name, 0) + 1

        layer.register_forward_pre_hook(count)
    return forwards


@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_balance_loss_alone_reaches_the_routers(has_checkpointing: bool) -> None:
    model = sparse_model().train()
    if has_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(**collate(tiny_samples()), output_routing=True)
    output.balance_loss.backward()
    assert len(output.routing) == 3  # a recompute adds nothing
    grads = gradients(model)
    for name, _ in moe_layers(model):
        assert grads[f"{name}.router.gate.weight"].abs().sum() > 0


def test_checkpointing_turned_on_before_upcycling_stays_on() -> None:
    dense = tiny_llava().train()
    dense.gradient_checkpointing_enable({"use_reentrant": False})
    model = upcycle(dense, moe())
    forwards = _count_forwards(model)
    loss_and_gradients(model, collate(tiny_samples()))
    assert forwards == {name: 2 for name, _ in moe_layers(model)}


def test_reentrant_checkpointing_is_refused() -> None:
    # Its first forward has no graph, so a trace written there gives the balance loss no gradient, without an error.
    model = sparse_model().train()
    with pytest.raises(ValueError, match="reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**collate(tiny_samples()), use_cache=False).loss.backward()


# ------------------------------------------------------------------------------------------------------ generation


def prompts() -> list[TinySample]:
    """Prompts of 3 to 14 tokens with one image, none, two, none and one."""
    shapes = ((1, 2), (0, 2), (2, 5), (0, 9), (1, 6))
    return [tiny_sample(images, words, seed=index) for index, (images, words) in enumerate(shapes)]


def generate(
    model: MoELlavaForConditionalGeneration, samples: list[TinySample], **options: Any
) -> tuple[Tensor, Tensor]:
    """(tokens [B, 6], logits [B, 6, V]) of greedy generation from left-padded prompts."""
    batch = collate(samples, side="left")
    batch.pop("labels")
    output = model.generate(
        **batch,
        **({"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "suppress_tokens": [IMAGE_ID]} | options),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("family", ["llama", "phi", "mistral"])
def test_generation_with_and_without_cache(family: str) -> None:
    model = sparse_model(family)
    tokens, logits = generate(model, prompts())
    expected_tokens, expected_logits = generate(model, prompts(), use_cache=False)
    assert tokens.tolist() == expected_tokens.tolist()
    assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    assert len({tuple(row) for row in tokens.tolist()}) > 1  # prompts get answers of their own


@pytest.mark.parametrize("family", ["llama", "phi", "stablelm"])
def test_an_answer_does_not_depend_on_its_batch(family: str) -> None:
    model = sparse_model(family)
    tokens, logits = generate(model, prompts())
    for row, sample in enumerate(prompts()):
        alone_tokens, alone_logits = generate(model, [sample])
        assert tokens[row].tolist() == alone_tokens[0].tolist()
        assert_close(logits[row], alone_logits[0], atol=1e-4, rtol=1e-4)


def test_a_text_only_batch_generates() -> None:
    samples = [sample for sample in prompts() if sample.pixel_values is None]
    tokens, _ = generate(sparse_model(), samples)
    assert tokens.shape == (2, 6)


def test_a_generated_image_token_is_language() -> None:
    # every answer token is the image token; the next steps must not take it for an image
    model = sparse_model()
    seen: list[Tensor] = []
    _, layer = moe_layers(model)[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[1].modality_BS))
    others = [token for token in range(VOCABULARY) if token != IMAGE_ID]
    tokens, _ = generate(model, [prompts()[0]], suppress_tokens=others)
    assert tokens.tolist() == [[IMAGE_ID] * 6]
    assert (seen[0] == int(Modality.VISION)).sum() == IMAGE_TOKENS
    assert [step.tolist() for step in seen[1:]] == [[[int(Modality.LANGUAGE)]]] * 5


def test_several_answers_of_a_sample_with_two_images() -> None:
    # each beam, and each returned answer, must see the images of its own sample, in their order
    model = sparse_model()
    samples = [prompts()[2], prompts()[0]]
    alone = [generate(model, [sample])[0][0].tolist() for sample in samples]
    tokens, _ = generate(model, [s for s in samples for _ in range(2)])
    assert tokens.tolist() == [alone[0], alone[0], alone[1], alone[1]]
    batch = collate(samples, side="left")
    batch.pop("labels")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 2, "do_sample": False}
    together = model.generate(**batch, **options)[:, -3:]
    for row, sample in enumerate(samples):
        single = collate([sample], side="left")
        single.pop("labels")
        assert together[row].tolist() == model.generate(**single, **options)[0, -3:].tolist()


# ------------------------------------------------------------------------------------------------------ bad input


def test_image_tokens_that_do_not_match_the_images() -> None:
    model = sparse_model()
    input_ids = torch.tensor([[BOS_ID, *([IMAGE_ID] * 6), 5]])
    with pytest.raises(ValueError, match="6"):
        model(input_ids=input_ids, pixel_values=torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE))


def test_padding_id_is_known_to_generation() -> None:
    assert sparse_model().generation_config.pad_token_id == PAD_ID


def test_bf16_model_is_close_to_float32() -> None:
    model, batch = sparse_model().train(), collate(tiny_samples())
    expected = model(**batch)
    model.bfloat16()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    output = model(**batch, output_routing=True)
    assert model(**without_labels(batch)).logits.dtype == torch.bfloat16
    assert {decision.probs_RE.dtype for _, decision in output.routing.items()} == {torch.float32}
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    output.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_shake_changes_what_the_model_says() -> None:
    # the builder's own check: experts that differ make routing matter
    model, batch = sparse_model(), collate(tiny_samples())
    before = model(**batch).logits
    for _, layer in moe_layers(model):
        shake(layer.router, scale=1.0, seed=99)
    assert (model(**batch).logits - before).abs().max() > 1e-2
