"""Generated answers against a plain loop over one prompt at a time without padding and without a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerFast

from moe_lvlm.data.templates import build_template, end_of_turn_id
from moe_lvlm.evaluation.generation import (
    collate_prompts,
    end_token_ids,
    generate_answers,
    generate_ids,
)

from .conftest import NAMES, TinyPrompt, greedy_by_hand

NEW_TOKENS = 6


@pytest.fixture(params=["dense", "moe"], scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, prompts: list[TinyPrompt]) -> list[list[int]]:
    answers = [greedy_by_hand(model, prompt, steps=NEW_TOKENS, end_id=2) for prompt in prompts]
    # the checks would be blind if all answers were alike
    assert len({tuple(answer) for answer in answers}) >= 5
    assert max(len(set(answer)) for answer in answers) >= 3
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_answer_depends_neither_on_its_batch_nor_on_the_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[TinyPrompt],
    expected: list[list[int]],
    batch_size: int,
    use_cache: bool,
) -> None:
    found = generate_ids(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=NEW_TOKENS, use_cache=use_cache
    )
    assert found == expected


def test_an_answer_ends_before_the_first_end_token(
    dense_model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, prompts: list[TinyPrompt]
) -> None:
    free = greedy_by_hand(dense_model, prompts[0], steps=NEW_TOKENS, end_id=-1)
    end = free[2]
    cut = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token=tokenizer.convert_ids_to_tokens(end),
        unk_token="<unk>",
    )
    [found] = generate_ids(dense_model, cut, prompts[:1], batch_size=1, max_new_tokens=NEW_TOKENS)
    assert found == free[: free.index(end)]


def test_sampling_and_penalties_of_the_model_are_not_used(
    dense_model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[TinyPrompt],
) -> None:
    other = LlavaForConditionalGeneration(dense_model.config).eval()
    other.load_state_dict(dense_model.state_dict())
    other.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=6
    )
    expected = generate_ids(dense_model, tokenizer, prompts, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert generate_ids(other, tokenizer, prompts, batch_size=4, max_new_tokens=NEW_TOKENS) == expected


def test_answers_are_text_without_special_tokens(
    dense_model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, prompts: list[TinyPrompt]
) -> None:
    class Processor:
        pass

    processor = Processor()
    processor.tokenizer = tokenizer  # type: ignore[attr-defined]
    expected = [
        " ".join(NAMES[token] for token in greedy_by_hand(dense_model, prompt, steps=4, end_id=2) if token >= 5)
        for prompt in prompts
    ]
    found = generate_answers(dense_model, processor, prompts, batch_size=2, max_new_tokens=4)  # type: ignore[arg-type]
    assert [answer.split() for answer in found] == [answer.split() for answer in expected]


def test_padding_stands_on_the_left_and_images_keep_the_order_of_the_rows(
    dense_model: LlavaForConditionalGeneration, prompts: list[TinyPrompt]
) -> None:
    batch = collate_prompts([prompts[4], prompts[3], prompts[0]], model=dense_model, pad_id=0)
    lengths = [3, 14, 8]
    assert batch["attention_mask"].tolist() == [[0] * (14 - length) + [1] * length for length in lengths]
    assert batch["input_ids"][0].tolist() == [0] * 11 + prompts[4].input_ids.tolist()
    assert torch.equal(batch["pixel_values"], torch.cat([prompts[3].pixel_values, prompts[0].pixel_values]))
    assert "pixel_values" not in collate_prompts([prompts[4]], model=dense_model, pad_id=0)


def test_no_prompt_no_answer(dense_model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate_ids(dense_model, tokenizer, [], batch_size=2, max_new_tokens=2) == []


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("max_new_tokens", -1)])
def test_sizes_below_one_are_refused(
    dense_model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, name: str, value: int
) -> None:
    sizes = {"batch_size": 1, "max_new_tokens": 1} | {name: value}
    with pytest.raises(ValueError, match=f"{name}: {value}"):
        generate_ids(dense_model, tokenizer, [], **sizes)


def test_an_empty_prompt_is_refused(
    dense_model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, prompts: list[TinyPrompt]
) -> None:
    empty = TinyPrompt(torch.empty(0, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="prompt 1"):
        generate_ids(dense_model, tokenizer, [prompts[0], empty], batch_size=1, max_new_tokens=1)


def test_a_model_without_an_end_token_is_refused(dense_model: LlavaForConditionalGeneration) -> None:
    other = LlavaForConditionalGeneration(dense_model.config)
    other.generation_config.eos_token_id = None

    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match="eos_token"):
        end_token_ids(other, Endless())  # type: ignore[arg-type]


def test_the_end_of_a_turn_is_the_template_s_own(tokenizer: PreTrainedTokenizerFast) -> None:
    own = build_template("chat", "tokenizer", tokenizer, "<image>")
    assert end_of_turn_id(own, tokenizer) == 2
    assert end_of_turn_id(build_template("plain", "tokenizer", tokenizer, "<image>"), tokenizer) == 2

    chatml = copy.deepcopy(tokenizer)
    chatml.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert end != chatml.eos_token_id
    assert end_of_turn_id(build_template("chat", "chatml", chatml, "<image>"), chatml) == end


def test_further_end_tokens_end_an_answer(
    dense_model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, prompts: list[TinyPrompt]
) -> None:
    free = greedy_by_hand(dense_model, prompts[0], steps=NEW_TOKENS, end_id=-1)
    end = free[1]
    [found] = generate_ids(dense_model, tokenizer, prompts[:1], batch_size=1, max_new_tokens=NEW_TOKENS, end_ids=[end])
    assert found == free[: free.index(end)]
