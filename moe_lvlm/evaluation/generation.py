"""Answers by greedy generation with the KV cache, in batches, such that no answer depends on its batch.

B batch   S sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from moe_lvlm.data.collator import pad_rows


class Prompt(Protocol):
    """What a model answers: a rendered conversation that waits for its next answer.

    input_ids: [S] int64, every image mark expanded to its placeholders.
    instruction: [S] bool, the user's words. cluster: of the instruction, dataset_index: of the dataset in the mixture,
        None where they are not known.
    pixel_values: [images, C, H, W] float32 in the order of the marks, or None.
    connector_ids: [W] int64, the words that a Q-Former reads beside each image, None where there is no Q-Former.
    """

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def instruction(self) -> Tensor: ...

    @property
    def cluster(self) -> int | None: ...

    @property
    def dataset_index(self) -> int | None: ...

    @property
    def pixel_values(self) -> Tensor | None: ...

    @property
    def connector_ids(self) -> Tensor | None: ...


def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    end_ids: Sequence[int] = (),
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt, in the order of the prompts, without special tokens and outer space.

    end_ids: tokens that end an answer besides those of tokenizer and model (see `data.templates.end_of_turn_id`).
    on_batch: called with the number of prompts after each batch, in place of a progress bar on the terminal.

    Raises:
        ValueError: batch_size or max_new_tokens is below 1, or a prompt is empty.
    """
    answers = generate_ids(
        model,
        processor.tokenizer,
        prompts,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        end_ids=end_ids,
        on_batch=on_batch,
    )
    return [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


@torch.inference_mode()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    end_ids: Sequence[int] = (),
    use_cache: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Token ids of the greedy answers, in the order of the prompts, up to (and without) the first end token.

    Prompts of like length share a batch, which saves padding. Padding stands on the left, is masked, and shifts no
    position. use_cache: False computes every step from the whole sequence (slow; a check on the cache). The rest as in
    `generate_answers`.

    Raises:
        ValueError: batch_size or max_new_tokens is below 1, or a prompt is empty.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}: {value}; at least 1 is needed")
    for index, prompt in enumerate(prompts):
        if prompt.input_ids.numel() == 0:
            raise ValueError(f"prompt {index}: it holds no token; at least one is needed")

    config = greedy_config(model, tokenizer, max_new_tokens=max_new_tokens, extra_end_ids=end_ids, use_cache=use_cache)
    # longest first: a batch that does not fit into memory fails at once, not at the end
    order = sorted(range(len(prompts)), key=lambda index: -prompts[index].input_ids.numel())
    answers: list[list[int]] = [[] for _ in prompts]
    with ExitStack() as stack:
        advance = on_batch or stack.enter_context(progress_bar("generate", len(prompts)))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate_prompts([prompts[index] for index in chosen], model=model, pad_id=config.pad_token_id)
            output_BS = model.generate(**batch, generation_config=config)
            first = _answer_start(model, batch["input_ids"])
            for index, ids in zip(chosen, output_BS[:, first:].tolist(), strict=True):
                answers[index] = _until_end(ids, config.eos_token_id)
            advance(len(chosen))
    return answers


@torch.inference_mode()
def stream_answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    streamer: BaseStreamer,
    end_ids: Sequence[int] = (),
) -> str:
    """The greedy answer to one prompt; the streamer gets its tokens as they come."""
    tokenizer = processor.tokenizer
    config = greedy_config(model, tokenizer, max_new_tokens=max_new_tokens, extra_end_ids=end_ids)
    batch = collate_prompts([prompt], model=model, pad_id=config.pad_token_id)
    [ids] = model.generate(**batch, generation_config=config, streamer=streamer).tolist()
    answer = _until_end(ids[_answer_start(model, batch["input_ids"]) :], config.eos_token_id)
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def collate_prompts(
    prompts: Sequence[Prompt], *, model: PreTrainedModel, pad_id: int, padding: Literal["left", "right"] = "left"
) -> dict[str, Tensor]:
    """One batch on the model's device: input_ids and attention_mask [B, S], and pixel_values in the model's type if
    there is an image; of instruction_mask [B, S], cluster_ids and dataset_ids [B] what the model's routers and gates ask
    (`prompt_facts` of its configuration), numbers if all prompts have one; for a Q-Former its words, a row an image. Generation goes on at the right end, so it wants its
    padding on the left."""
    longest = max(prompt.input_ids.numel() for prompt in prompts)
    input_ids_BS = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    attention_mask_BS = torch.zeros_like(input_ids_BS)
    instruction_mask_BS = torch.zeros_like(input_ids_BS)
    for row, prompt in enumerate(prompts):
        length = prompt.input_ids.numel()
        start = longest - length if padding == "left" else 0
        input_ids_BS[row, start : start + length] = prompt.input_ids
        attention_mask_BS[row, start : start + length] = 1
        instruction_mask_BS[row, start : start + length] = prompt.instruction
    batch = {"input_ids": input_ids_BS, "attention_mask": attention_mask_BS}
    # transformers' own models, which know no such arguments, have no such property
    facts: frozenset[str] = getattr(model.config, "prompt_facts", frozenset())
    if "instruction_mask" in facts:
        batch["instruction_mask"] = instruction_mask_BS
    if "cluster_ids" in facts:
        batch |= _numbers("cluster_ids", [prompt.cluster for prompt in prompts])
    if "dataset_ids" in facts:
        batch |= _numbers("dataset_ids", [prompt.dataset_index for prompt in prompts])
    words = [
        prompt.connector_ids
        for prompt in prompts
        if prompt.connector_ids is not None and prompt.pixel_values is not None
        for _ in prompt.pixel_values
    ]
    if words:
        ids, mask = pad_rows(words, model.config.qformer_config.pad_token_id)
        batch |= {"qformer_input_ids": ids, "qformer_attention_mask": mask}
    batch = {name: value.to(model.device) for name, value in batch.items()}
    images = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    if images:
        batch["pixel_values"] = torch.cat(images).to(model.device, model.dtype)
    return batch


def _numbers(name: str, values: Sequence[int | None]) -> dict[str, Tensor]:
    """Nothing where some are not known: the model then says what it lacks."""
    known = [value for value in values if value is not None]
    return {name: torch.tensor(known)} if len(known) == len(values) else {}


def _answer_start(model: PreTrainedModel, input_ids_BS: Tensor) -> int:
    """Where in what `generate` returns an answer begins: behind the prompt, or behind the start of a decoder of its own."""
    return 1 if getattr(model.config, "is_answer_apart", False) else input_ids_BS.shape[1]


def greedy_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    extra_end_ids: Sequence[int] = (),
    use_cache: bool = True,
) -> GenerationConfig:
    """Plain greedy search that never gives the image mark: a mark in an answer would stand for an image that is not
    there. What the model's own generation config may hold (sampling, penalties) is set to neutral values, because
    `generate` would fill them in where they are left open.

    Raises:
        ValueError: no token ends an answer.
    """
    end_ids = list(dict.fromkeys([*end_token_ids(model, tokenizer), *extra_end_ids]))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        suppress_tokens=[model.config.image_token_id],
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=end_ids,
        use_cache=use_cache,
    )


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation config.

    Raises:
        ValueError: there is none.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = [configured] if isinstance(configured, int) else list(configured or ())
    if tokenizer.eos_token_id is not None:
        found.insert(0, tokenizer.eos_token_id)
    if not found:
        raise ValueError("no token ends an answer: set eos_token of the tokenizer, or of the model's generation config")
    return list(dict.fromkeys(found))


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the error stream, if that is a terminal; the block gets what advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda count: progress.advance(bar, count)


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    ends = [position for position, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0]] if ends else ids
