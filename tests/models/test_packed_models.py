"""Packed batches give the losses, gradients and decisions of padded ones: every family, router, adapter and connector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lvlm.config.connector import ExpertSettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.models.adapt import adapt
from moe_lvlm.models.build import build_dense
from moe_lvlm.models.packed_attention import attend_within_samples
from moe_lvlm.training.trainable import select_trainable
from tests.adapters.problems import mocle, shake_adapters, targets_of
from tests.models.packed_batches import (
    assert_packing_changes_nothing,
    assert_same,
    collate,
    learn,
    samples,
    text_only,
)
from tests.models.test_qformer_llava import NUM_QUERIES, folder, settings
from tests.parallel.problems import ROUTINGS, Problem, build
from tests.tiny_models import NUM_QUERIES as BLIP_QUERIES
from tests.tiny_models import NUM_WORDS, TEXT_CONFIGS, tiny_moe_blip, tiny_moe_llava

__all__ = ["folder"]  # a fixture


@pytest.mark.parametrize("family", sorted(TEXT_CONFIGS))
def test_every_family(family: str) -> None:
    """Mistral's and Qwen2's windows are shorter than most samples."""
    problem = Problem(family=family, is_sparse=False, train=("connector", "language_model"))
    assert_packing_changes_nothing(lambda: build(problem), samples())


@pytest.mark.parametrize("family", ["llama", "stablelm", "phi"])
def test_every_family_sparse_and_checkpointed(family: str) -> None:
    def sparse() -> Any:
        model = build(Problem(family=family, train=("language_model",)))
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    assert_packing_changes_nothing(sparse, samples())


@pytest.mark.parametrize("routing", sorted(ROUTINGS))
def test_every_routing(routing: str) -> None:
    of = samples()
    if routing == "capacity":
        # capacity counts the positions of a micro-batch, padding too: the same only where there is none
        of = [of[2], of[3]]
        of[0], of[1] = (_cut(sample, 14) for sample in of)
    assert_packing_changes_nothing(lambda: build(Problem(routing=routing)), of)


def _cut(sample: Any, length: int) -> Any:
    parts = {name: getattr(sample, name)[:length] for name in ("input_ids", "labels", "instruction")}
    parts["labels"] = torch.where(torch.arange(length) >= length - 2, parts["input_ids"], -100)
    return replace(sample, **parts)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_tails_of_every_scope(scope: str) -> None:
    config = MoEConfig.model_validate(
        {"num_experts": 4, "top_k": 1, "router": {"kind": "ltdr", "tail_k": 4, "tail_scope": scope}}
    )
    assert_packing_changes_nothing(lambda: tiny_moe_llava(config).train(), samples())


def test_text_alone() -> None:
    assert_packing_changes_nothing(lambda: build(Problem()), text_only(samples()))


def test_no_sample_at_all() -> None:
    """Zero loss, and the gradients of every rank's part."""
    padded = learn(build(Problem()), collate([], is_packed=False))
    model = build(Problem())
    attend_within_samples(model.get_decoder())
    packed = learn(model, collate([], is_packed=True))
    assert_same(packed, padded)
    assert packed.losses[0] == 0
    assert all(gradient.isfinite().all() for gradient in packed.gradients.values())


@pytest.mark.parametrize("gating", ["cluster", "dataset", "sentence", "token"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_adapters(family: str, gating: str) -> None:
    def adapted() -> Any:
        model = build(Problem(family=family, is_sparse=False, train=("connector",)))
        adapt(model, mocle(target_modules=targets_of(family), gating=gating), seed=0)
        shake_adapters(model)
        select_trainable(model, ("adapter", "connector"))
        return model.train()

    assert_packing_changes_nothing(adapted, samples())


@pytest.mark.parametrize("text", ["llama", "opt"])
@pytest.mark.parametrize("router", [None, "cross", "pre"])
def test_instructblip(text: str, router: str | None) -> None:
    """Noise on the routing of a Q-MoE is drawn by sample, so it is the same."""
    experts = None if router is None else ExpertSettings.model_validate({"num_layers": 2, "router": router})
    of = samples(tokens_an_image=BLIP_QUERIES, vocabulary=NUM_WORDS)
    assert_packing_changes_nothing(lambda: tiny_moe_blip(experts, text).train(), of, has_words=True)


@pytest.mark.parametrize("kind", ["qformer", "qmoe"])
def test_a_q_former_in_llava(kind: str, folder: Path) -> None:
    image_id = build_dense(settings(folder, kind=kind), seed=1)[0].config.image_token_id
    of = samples(tokens_an_image=NUM_QUERIES, image_size=16, vocabulary=image_id, image_id=image_id)
    assert_packing_changes_nothing(
        lambda: build_dense(settings(folder, kind=kind), seed=1)[0].train(), of, image_id=image_id, has_words=True
    )
