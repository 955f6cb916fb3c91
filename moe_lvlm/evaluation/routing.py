"""Routing of an evaluation's prompts: statistics over all of them, and a few examples with their tail tokens.

B batch   S sequence   C channels   H, W pixels
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from moe_lvlm.analysis.adapters import AdapterStatistics
from moe_lvlm.analysis.examples import ExampleStore, displayable
from moe_lvlm.analysis.foreground import patch_grid, pool_patches
from moe_lvlm.analysis.paths import PathStatistics
from moe_lvlm.analysis.statistics import RoutingStatistics
from moe_lvlm.config.adapter import MoCLESettings
from moe_lvlm.evaluation.generation import Prompt, collate_prompts
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import LANGUAGE_MODEL

ForegroundByImage = list[NDArray[np.float32] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A prompt with what came of it. task: the score that it counts for. foreground: for each image the share of
    foreground in each of its visual tokens, in patch order, or None for an image without a mask, or whose visual tokens
    are no patches (`has_patch_tokens`)."""

    key: str
    task: str
    question: str
    answer: str
    prediction: str
    prompt: Prompt
    foreground: ForegroundByImage


class RoutingCollector:
    """Runs prompts through the model once more, without generation, and adds up how they were routed.

    statistics: of tokens, in the language model; examples: images with the tail tokens that it has, where visual tokens
    are patches; paths: of images, in the connector. Each is empty if the model has no such experts. adapters: of samples, by
    task, at the LoRA experts of the language model; None if it has none.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, num_examples: int = 12) -> None:
        self.statistics = RoutingStatistics()
        self.examples = ExampleStore(limit=num_examples)
        self.paths = PathStatistics()
        settings = model.config.adapter_settings
        self.adapters = (
            AdapterStatistics(gating=settings.gating, has_universal=settings.has_universal)
            if isinstance(settings, MoCLESettings)
            else None
        )
        self._seen: set[bytes] = set()
        self._model = model
        self._processor = processor

    @torch.inference_mode()
    def update(self, answered: Sequence[Answered], *, batch_size: int) -> None:
        """Add prompts. A dense model, which routes nothing, adds nothing.

        Raises:
            ValueError: a foreground does not fit its image's visual tokens.
        """
        for start in range(0, len(answered), batch_size):
            self._update_batch(answered[start : start + batch_size])

    def _update_batch(self, answered: Sequence[Answered]) -> None:
        pad_id = self._processor.tokenizer.pad_token_id
        # on the right, padding shifts no position, so the model needs no position ids
        batch = collate_prompts([item.prompt for item in answered], model=self._model, pad_id=pad_id, padding="right")
        trace = self._model(**batch, output_routing=True, use_cache=False, logits_to_keep=1).routing
        if trace is None or not len(trace):
            return
        self.statistics.update(trace, [share for item in answered for share in item.foreground])
        self.paths.update(trace, [item.task for item in answered for _ in item.foreground])
        if self.adapters is not None:
            self.adapters.update(trace, [item.task for item in answered])
        if not (trace.of(LANGUAGE_MODEL) and has_patch_tokens(self._model.config)):
            return
        first_image = 0
        for item in answered:
            pixels = item.prompt.pixel_values
            if pixels is not None:
                self._add_example(trace, item, pixels[0], image_index=first_image)
                first_image += len(pixels)

    def _add_example(self, trace: RoutingTrace, item: Answered, pixels_CHW: Tensor, *, image_index: int) -> None:
        """Keep the image, unless the store is full or holds it already."""
        digest = hashlib.sha256(pixels_CHW.numpy().tobytes()).digest()
        if self.examples.is_full or digest in self._seen:
            return
        self._seen.add(digest)
        height, width = pixels_CHW.shape[-2:]
        self.examples.add(
            trace,
            image_index=image_index,
            image=displayable(pixels_CHW, **normalisation(self._processor.image_processor)),
            grid=patch_grid(height, width, self._processor.patch_size),
            key=item.key,
            question=item.question,
            answer=item.answer,
            prediction=item.prediction,
            foreground=item.foreground[0],
        )


def has_patch_tokens(config: PreTrainedConfig) -> bool:
    """Whether an image's visual tokens are its patches, row by row; those of a Q-Former are its queries."""
    return getattr(config, "qformer_config", None) is None


def normalisation(image_processor: Any) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation that the image processor took out of its pixels."""
    if not image_processor.do_normalize:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return {"mean": tuple(image_processor.image_mean), "std": tuple(image_processor.image_std)}


def foreground_of(is_foreground_HW: NDArray[np.bool_], image_processor: Any, *, patch_size: int) -> NDArray[np.float32]:
    """Share of foreground in every visual token: float32 [rows x columns], in patch order.

    Whatever the image processor does to an image (resize, crop, pad) it does to the mask, so that both agree for any
    processor.
    """
    mask = Image.fromarray(is_foreground_HW.astype(np.uint8) * 255).convert("RGB")
    # box resampling: a pixel of the result is the share of foreground under it
    processed = image_processor(
        mask, do_normalize=False, do_rescale=True, resample=Image.Resampling.BOX, return_tensors="pt"
    )
    share_HW = processed["pixel_values"][0, 0].float().numpy()
    return pool_patches(share_HW, patch_size).clip(0, 1)
