"""Answers of a model whose tokens take any number of experts, some experts idle, some tokens the argmax."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from moe_lvlm.config.moe import DynamicRouterSettings, MoEConfig
from moe_lvlm.evaluation.generation import generate_ids
from moe_lvlm.models.upcycle import upcycle
from moe_lvlm.moe.upcycle import moe_layers

from .conftest import TinyPrompt, greedy_by_hand

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def dynamic_model(dense_model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    moe = MoEConfig(layers="dense", num_experts=5, top_k=1, router=DynamicRouterSettings(initial_experts=4))
    model = upcycle(copy.deepcopy(dense_model), moe)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in moe_layers(model):
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            layer.router.gate.threshold.copy_(torch.tensor([0.1, 0.0, 0.2, 0.05, 0.0]))
    return model.eval()


@pytest.fixture(scope="module")
def expected(dynamic_model: LlavaForConditionalGeneration, prompts: list[TinyPrompt]) -> list[list[int]]:
    numbers: set[int] = set()
    for prompt in prompts:
        output = dynamic_model(input_ids=prompt.input_ids[None], pixel_values=prompt.pixel_values, output_routing=True)
        for _, decision in output.routing.items():
            numbers |= set(decision.keep_RK.sum(dim=-1).tolist())
            assert 4 not in decision.expert_ids_RK[decision.keep_RK]
    assert numbers >= {1, 2, 3}
    answers = [greedy_by_hand(dynamic_model, prompt, steps=NEW_TOKENS, end_id=2) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) >= 5
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_answer_depends_neither_on_its_batch_nor_on_the_cache(
    dynamic_model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[TinyPrompt],
    expected: list[list[int]],
    batch_size: int,
    use_cache: bool,
) -> None:
    found = generate_ids(
        dynamic_model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=NEW_TOKENS, use_cache=use_cache
    )
    assert found == expected
