"""What holds for a whole model with any router: it starts as the dense model, recomputes, generates, comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.llava import MoELlavaForConditionalGeneration
from moe_lvlm.models.upcycle import upcycle
from tests.routing.tables import ROWS
from tests.tiny_models import (
    IMAGE_ID,
    TinySample,
    collate_with_facts,
    tiny_llava,
    tiny_moe_llava,
    tiny_sample,
    tiny_samples,
)

every_router = pytest.mark.parametrize("router", [settings for settings, _ in ROWS], ids=str)


def config_of(router: dict[str, Any], **fields: Any) -> MoEConfig:
    fields = {"layers": "dense", "num_experts": 6, "top_k": 2, "router": router} | fields
    return MoEConfig.model_validate(fields)


def sparse_model(router: dict[str, Any], **fields: Any) -> MoELlavaForConditionalGeneration:
    """Eager attention, the one kind whose weights `instruction_aware` can read."""
    model = tiny_moe_llava(config_of(router, **fields)).eval()
    model.set_attn_implementation("eager")
    return model


@every_router
def test_the_upcycled_model_is_the_dense_model(router: dict[str, Any]) -> None:
    dense = tiny_llava()
    dense.set_attn_implementation("eager")
    batch = collate_with_facts(tiny_samples())
    is_token = batch["attention_mask"] == 1
    plain = {name: value for name, value in batch.items() if name not in ("instruction_mask", "cluster_ids")}
    expected = dense(**plain).logits
    logits = upcycle(copy.deepcopy(dense), config_of(router)).eval()(**batch).logits
    assert_close(logits[is_token], expected[is_token], atol=1e-5, rtol=1e-5)


def prompts() -> list[TinySample]:
    """Prompts of 5 to 14 tokens with one image, none, two, none and one."""
    shapes = ((1, 4), (0, 4), (2, 5), (0, 9), (1, 6))
    return [tiny_sample(images, words, seed=index) for index, (images, words) in enumerate(shapes)]


def generate(model: MoELlavaForConditionalGeneration, samples: list[TinySample], **options: Any) -> Tensor:
    """Tokens [B, 6] of greedy generation from left-padded prompts; the image mark is no answer."""
    batch = collate_with_facts(samples, side="left")
    batch.pop("labels")
    fixed = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "suppress_tokens": [IMAGE_ID]}
    return model.generate(**batch, **(fixed | options))[:, batch["input_ids"].shape[1] :]


@every_router
def test_generation_with_and_without_cache(router: dict[str, Any]) -> None:
    model = sparse_model(router)
    tokens = generate(model, prompts())
    assert tokens.tolist() == generate(model, prompts(), use_cache=False).tolist()
    assert len({tuple(row) for row in tokens.tolist()}) > 1  # prompts get answers of their own


@every_router
def test_beams_share_what_was_decided_at_the_prompt(router: dict[str, Any]) -> None:
    model = sparse_model(router)
    options = {"num_beams": 3, "do_sample": False}
    tokens = generate(model, prompts(), **options)
    assert tokens.tolist() == generate(model, prompts(), use_cache=False, **options).tolist()


@every_router
def test_checkpointing_changes_no_gradient(router: dict[str, Any]) -> None:
    batch = collate_with_facts(tiny_samples())
    found = []
    for is_checkpointed in (False, True):
        model = sparse_model(router).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model(**batch, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert any(".router." in name for name in plain)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@every_router
def test_save_and_from_pretrained(router: dict[str, Any], tmp_path: Path) -> None:
    model = sparse_model(router)
    model.save_pretrained(tmp_path)
    again = MoELlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.config.moe_config == model.config.moe_config
    batch = collate_with_facts(tiny_samples())
    batch.pop("labels")
    assert_close(again(**batch).logits, model(**batch).logits, atol=0, rtol=0)


def test_the_instruction_decides_where_its_sample_goes() -> None:
    """Another instruction, with the image and the answer as they are, moves the routing of all tokens."""
    model = sparse_model({"kind": "instruct"})
    batch = collate_with_facts([tiny_sample(1, 6, seed=0)])
    other = dict(batch) | {"instruction_mask": batch["instruction_mask"].roll(1, dims=1)}
    first, second = (
        [decision.probs_RE for _, decision in model(**facts, output_routing=True).routing.items()]
        for facts in (batch, other)
    )
    assert all(probs.shape == (1, 6) for probs in first)
    assert not torch.allclose(first[0], second[0])


@pytest.mark.parametrize(
    ("router", "missing", "words"),
    [
        ({"kind": "instruct"}, "instruction_mask", "give instruction_mask"),
        ({"kind": "cluster", "num_clusters": 5, "embedding_width": 12}, "cluster_ids", "cluster_ids"),
        ({"kind": "ltdr", "eea_select": "instruction_aware"}, "instruction_mask", "give instruction_mask"),
    ],
)
def test_a_fact_that_is_not_given_is_missed(router: dict[str, Any], missing: str, words: str) -> None:
    batch = collate_with_facts(tiny_samples())
    del batch[missing]
    with pytest.raises(ValueError, match=words):
        sparse_model(router)(**batch)


def test_attention_weights_that_are_not_there_are_missed() -> None:
    model = tiny_moe_llava(config_of({"kind": "ltdr", "eea_select": "instruction_aware"}))
    with pytest.raises(ValueError, match=r"allowed: model\.attention: eager"):
        model(**collate_with_facts(tiny_samples()))


def test_a_cluster_outside_the_table_is_refused() -> None:
    batch = collate_with_facts(tiny_samples()) | {"cluster_ids": torch.tensor([0, 5, 1, 2])}
    with pytest.raises(ValueError, match="cluster 5; allowed: 0 to 4"):
        sparse_model({"kind": "cluster", "num_clusters": 5, "embedding_width": 12})(**batch)
