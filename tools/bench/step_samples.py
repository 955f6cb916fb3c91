"""The samples of one optimizer step: a recipe's own, or drawn at the lengths that LLaVA's data has.

S sequence   M visual tokens of an image
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_lvlm.config.recipe import Recipe
from moe_lvlm.data.balance import step_balance
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.errors import BadRecordError
from moe_lvlm.data.loader import MicroBatch
from moe_lvlm.data.sample import IGNORED_LABEL, Sample
from moe_lvlm.estimation.samples import SampleLengths
from moe_lvlm.models.images import image_size
from moe_lvlm.models.instructblip_config import VLMConfig
from moe_lvlm.models.processor import Processor, num_image_tokens
from moe_lvlm.parallel.process_group import World
from moe_lvlm.training.build import run_processor, stage_config
from moe_lvlm.training.data import open_stage_data

_CLIP_TOKENS = 576  # of an image, beside which LLaVA's texts have the length that `SampleLengths` gives them


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSamples:
    """This process's micro-batches of one step as samples, and what makes batches of them (as in `Collator`)."""

    micro_batches: tuple[tuple[Sample, ...], ...]
    image_token_id: int
    pad_token_id: int
    has_task_labels: bool
    connector_pad_id: int | None

    def batches(self, *, is_packed: bool) -> list[MicroBatch]:
        """As the trainer's loader gives them."""
        collator = Collator(
            pad_token_id=self.pad_token_id,
            image_token_id=self.image_token_id,
            has_task_labels=self.has_task_labels,
            connector_pad_id=self.connector_pad_id,
            is_packed=is_packed,
        )
        return [MicroBatch(collator(samples), (), len(samples)) for samples in self.micro_batches]


def read_samples(recipe: Recipe, stage: int, world: World) -> StepSamples:
    """The samples that this process takes in the first step of a stage, read and processed as the trainer does; images
    also where the recipe has a feature cache, whose place `step_engines.with_features` takes.

    Raises:
        ValueError: a record is bad, or a file cannot be used.
    """
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"feature_cache": None})})
    data = open_stage_data(recipe, stage, run_processor(recipe))
    dataset, collator, order = data.dataset, data.collator, data.order
    balance = step_balance(recipe.data, dataset.length)
    step = order.step(0) if balance is None else balance.micro_batches(order.draws(0), order.num_micro_batches)
    try:
        micro_batches = tuple(
            tuple(dataset[draw] for draw in step[number])
            for number in order.numbers(rank=world.rank, world_size=world.size)
        )
    except BadRecordError as error:
        raise ValueError(f"the step that is timed has a bad record: {error}") from error
    return StepSamples(
        micro_batches=micro_batches,
        image_token_id=collator.image_token_id,
        pad_token_id=collator.pad_token_id,
        has_task_labels=collator.has_task_labels,
        connector_pad_id=collator.connector_pad_id,
    )


def draw_samples(recipe: Recipe, stage: int, world: World, *, seed: int) -> StepSamples:
    """Random words and images at `draw_lengths`; no file is read but the tokenizer's.

    Raises:
        ValueError: a connector that reads words, which random words are not.
    """
    settings = recipe.stages[stage]
    processor = run_processor(recipe)
    if hasattr(processor, "qformer_tokenizer"):
        raise ValueError("--size: samples are drawn for LLaVA's projector (model.connector kind mlp) only")
    count = settings.global_batch // world.size
    config = stage_config(recipe, stage)
    visual = num_image_tokens(processor, *image_size(config.vision_config))
    # one stream of draws whatever the number of processes, as the trainer's order is
    sizes = draw_lengths(settings.global_batch, visual, seed=seed).tolist()[world.rank :: world.size]
    samples = [
        _draw(config, processor, number=world.rank + place * world.size, seed=seed, tokens=tokens, num_images=images)
        for place, (tokens, images) in enumerate(sizes)
    ]
    size = settings.micro_batch
    return StepSamples(
        micro_batches=tuple(tuple(samples[start : start + size]) for start in range(0, count, size)),
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        has_task_labels=False,
        connector_pad_id=None,
    )


def draw_lengths(count: int, visual_tokens: int, *, seed: int) -> np.ndarray:
    """[count, 2]: all tokens of each sample, and its images. Texts are in proportion to an image's visual tokens."""
    scale = visual_tokens / _CLIP_TOKENS
    llava = SampleLengths()
    lengths = SampleLengths(
        mean_text=max(llava.mean_text * scale, 1.0), max_length=max(round(llava.max_length * scale), 8)
    )
    return lengths.draw(count, visual_tokens, np.random.default_rng(seed))


def _draw(config: VLMConfig, processor: Processor, *, number: int, seed: int, tokens: int, num_images: int) -> Sample:
    """Sample `number`: images stand first; a part of the words between a fifth and four fifths is the answer."""
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    height, width = image_size(config.vision_config)
    visual = num_image_tokens(processor, height, width)
    words = tokens - num_images * visual
    # ids behind the tokenizer's own, among which are the image's mark and padding
    words_S = torch.randint(len(processor.tokenizer), config.text_config.vocab_size, (words,), generator=generator)
    input_ids = torch.cat((torch.full((num_images * visual,), processor.image_token_id), words_S))
    answer = max(1, round(words * float(torch.empty(1).uniform_(0.2, 0.8, generator=generator))))
    labels = input_ids.clone()
    labels[: len(labels) - answer] = IGNORED_LABEL
    instruction = (labels == IGNORED_LABEL) & (input_ids != processor.image_token_id)
    return Sample(
        key=f"drawn/{number}",
        dataset="drawn",
        task=None,
        input_ids=input_ids,
        labels=labels,
        instruction=instruction,
        pixel_values=torch.randn(num_images, 3, height, width, generator=generator) if num_images else None,
        image_tokens=(visual,) * num_images,
    )
