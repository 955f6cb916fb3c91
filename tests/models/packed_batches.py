"""The same samples padded and packed, and what a model makes of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from moe_lvlm.data.collator import Batch, Collator
from moe_lvlm.data.sample import Sample
from moe_lvlm.models.packed_attention import attend_within_samples
from moe_lvlm.routing.types import RoutingContext, RoutingDecision
from tests.tiny_models import IMAGE_ID, IMAGE_TOKENS, PAD_ID, tiny_sample

# images and words: one image, none, two, a sample longer than the tiny models' windows, a short one
SHAPES = ((1, 5), (0, 7), (2, 6), (1, 12), (0, 4))


def samples(
    *, tokens_an_image: int = IMAGE_TOKENS, image_size: int = 8, vocabulary: int = IMAGE_ID, image_id: int = IMAGE_ID
) -> list[Sample]:
    """Samples that know everything that a router or a gate may ask."""
    made = []
    for index, (num_images, num_words) in enumerate(SHAPES):
        words = 3 + tiny_sample(0, num_words, seed=index).input_ids[1:] % (vocabulary - 3)
        ids = torch.cat((torch.full((num_images * tokens_an_image,), image_id), words))
        is_answer = torch.arange(len(ids)) >= len(ids) - 2 - index % 2
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randn(num_images, 3, image_size, image_size, generator=generator)
        made.append(
            Sample(
                key=f"tiny/{index}",
                dataset="tiny",
                task=None,
                input_ids=ids,
                # the first token too: packed, it must not be predicted by the sample before
                labels=torch.where(is_answer | (torch.arange(len(ids)) == 0), ids, -100),
                instruction=~is_answer & (ids != image_id),
                pixel_values=pixels if num_images else None,
                image_tokens=(tokens_an_image,) * num_images,
                task_label=index % 2,
                cluster=index % 3,
                connector_ids=torch.tensor([1, *range(2, 3 + index)]),
                draw=1000 + index,
                dataset_index=index % 3,
            )
        )
    return made


def collate(of: Sequence[Sample], *, is_packed: bool, image_id: int = IMAGE_ID, has_words: bool = False) -> Batch:
    """By the real collator."""
    collator = Collator(
        pad_token_id=PAD_ID,
        image_token_id=image_id,
        has_task_labels=True,
        connector_pad_id=0 if has_words else None,
        is_packed=is_packed,
    )
    return collator(of)


@dataclass(frozen=True)
class Learned:
    """What one forward and backward gives: losses, gradients by name, decisions a token by site."""

    losses: tuple[float, float | None]
    gradients: dict[str, Tensor]
    decisions: list[tuple[object, RoutingDecision]]


def learn(model: PreTrainedModel, batch: Batch) -> Learned:
    """Decisions without the rows of padding, so that those of padded and packed batches are in the same order."""
    output = model(**batch, output_routing=True, use_cache=False)
    output.loss.backward()
    balance = None if output.balance_loss is None else float(output.balance_loss.detach())
    decisions = []
    if output.routing is not None:
        context: RoutingContext = output.routing.context
        for site, decision in output.routing.detach().items():
            if decision.level != "token":
                decisions.append((site, decision))
                continue
            is_token_T = context.sample_T >= 0
            kept = {name: getattr(decision, name)[is_token_T] for name in ("expert_ids_RK", "weights_RK", "keep_RK")}
            decisions.append((site, decision._replace(**kept)))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Learned((float(output.language_loss.detach()), balance), gradients, decisions)


def assert_packing_changes_nothing(build: Callable[[], PreTrainedModel], of: Sequence[Sample], **fields: Any) -> None:
    """build: makes the same model each time, in training mode. fields: of `collate`."""
    padded = learn(build(), collate(of, is_packed=False, **fields))
    model = build()
    attend_within_samples(model.get_decoder())
    packed = learn(model, collate(of, is_packed=True, **fields))
    assert_same(packed, padded)


def assert_same(found: Learned, expected: Learned) -> None:
    """Up to float32 rounding; the choice of experts exactly."""
    assert_close(found.losses[0], expected.losses[0], rtol=1e-6, atol=1e-6)
    assert (found.losses[1] is None) == (expected.losses[1] is None)
    if expected.losses[1] is not None:
        assert_close(found.losses[1], expected.losses[1], rtol=1e-5, atol=1e-6)
    assert found.gradients and found.gradients.keys() == expected.gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        atol = 1e-5 * float(gradient.abs().max()) + 1e-6 * scale  # those of keys' biases are rounding alone
        assert_close(found.gradients[name], gradient, rtol=1e-4, atol=atol, msg=f"gradients of {name} differ")
    assert [site for site, _ in found.decisions] == [site for site, _ in expected.decisions]
    for (_, one), (_, other) in zip(found.decisions, expected.decisions, strict=True):
        assert torch.equal(one.keep_RK, other.keep_RK)
        assert torch.equal(one.expert_ids_RK[one.keep_RK], other.expert_ids_RK[other.keep_RK])
        assert_close(one.weights_RK, other.weights_RK, rtol=1e-5, atol=1e-5)


def text_only(of: Sequence[Sample]) -> list[Sample]:
    """Those without an image."""
    return [replace(sample) for sample in of if not sample.image_tokens]
