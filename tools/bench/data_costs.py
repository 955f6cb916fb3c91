"""What one sample costs, part by part, in one process.

H, W height, width
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from moe_lvlm.data.collator import Collator
from moe_lvlm.data.images import load_image
from moe_lvlm.data.mixture import Draw, MixtureDataset, Source
from moe_lvlm.data.sample import process_image


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of this process's time, the median. per: what they are of."""

    label: str
    milliseconds: float
    per: str


class LookupProcessor:
    """An image processor whose last two steps, which look at each value by itself, are a table of 256 values a channel,
    filled by the processor itself: the same numbers to the bit, in one pass.

    Raises:
        ValueError: a processor that does not give its resized values back as they are.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self._image_processor = processor.image_processor
        values = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1, 256, 3))
        table = self._image_processor(
            images=[Image.fromarray(np.ascontiguousarray(values))],
            return_tensors="pt",
            do_resize=False,
            **({"do_center_crop": False} if hasattr(self._image_processor, "do_center_crop") else {}),
        )["pixel_values"][0]
        self._table_CV = table[:, 0].float().contiguous()
        if self._table_CV.shape != (3, 256):
            raise ValueError(f"a row of 256 values came back as {tuple(table.shape)}")

    def resized(self, image: Image.Image) -> Tensor:
        """uint8 [3, H, W], before the last two steps."""
        pixels = self._image_processor(images=[image], return_tensors="pt", do_rescale=False, do_normalize=False)
        return pixels["pixel_values"][0].to(torch.uint8)

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, H, W] float32."""
        pixels_CHW = self.resized(image).numpy()
        out_CHW = np.empty(pixels_CHW.shape, dtype=np.float32)
        for channel, table_V in enumerate(self._table_CV.numpy()):
            np.take(table_V, pixels_CHW[channel], out=out_CHW[channel])
        return torch.from_numpy(out_CHW)


def measure_costs(
    dataset: MixtureDataset, collator: Collator, draws: Sequence[Draw], *, repeats: int
) -> dict[str, Cost]:
    """The parts of making these draws' samples. Without an image among them those of images are left out.

    Raises:
        BadRecordError: a draw's record is bad.
    """
    processor = dataset.builder.processor
    places = [_record_images(*dataset.locate(draw)) for draw in draws]
    named = [(root, path) for root, paths in places for path in paths]
    images = [load_image(root, path) for root, path in named]
    samples = [dataset[draw] for draw in draws]
    costs: dict[str, Cost] = {}

    def add(name: str, label: str, per: str, count: int, work: Callable[[], object]) -> None:
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        costs[name] = Cost(label, 1e3 * statistics.median(seconds) / count, per)

    if images:
        lookup = LookupProcessor(processor)
        add("decode", "open, check and decode", "image", len(images), lambda: [load_image(*one) for one in named])
        add(
            "process",
            "image processor",
            "image",
            len(images),
            lambda: [process_image(processor, one) for one in images],
        )
        add(
            "resize",
            "of which up to the resized values",
            "image",
            len(images),
            lambda: [lookup.resized(x) for x in images],
        )
        if all(torch.equal(lookup(image), process_image(processor, image)) for image in images):
            label = "image processor, its last steps by lookup (equal pixels)"
            add("process_lookup", label, "image", len(images), lambda: [lookup(image) for image in images])
    add("text", "render and tokenise", "sample", len(draws), lambda: [dataset.length(draw) for draw in draws])
    add("sample", "all of a sample", "sample", len(draws), lambda: [dataset[draw] for draw in draws])
    add("collate", "collate", "sample", len(draws), lambda: collator(samples))
    return costs


def _record_images(source: Source, index: int) -> tuple[Path, tuple[str, ...]]:
    return source.image_root, source.record(index).images
