"""A few images of an evaluation with their tail tokens, for figures.

H, W pixels   T visual tokens of one image (rows x columns)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moe_lvlm.analysis.measures import tail_by_site
from moe_lvlm.routing.trace import RoutingTrace
from moe_lvlm.routing.types import Site

_FORMAT = 1
_TEXTS = ("key", "question", "answer", "prediction")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoutingExample:
    """One image as the model saw it, and what routing and generation made of it.

    image: uint8 [H, W, 3]. grid: rows and columns of its visual tokens. tail: bool [T] by site, in patch order.
    foreground: float32 [T], share of foreground in each token, or None without a mask.
    """

    key: str
    question: str
    answer: str
    prediction: str
    image: NDArray[np.uint8]
    grid: tuple[int, int]
    tail: dict[Site, NDArray[np.bool_]]
    foreground: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(
                f"{self.key}: image of {self.image.dtype} {self.image.shape}; allowed: uint8 [height, width, 3]"
            )
        tokens = self.grid[0] * self.grid[1]
        for name, array in [*self.tail.items(), ("foreground", self.foreground)]:
            if array is not None and array.shape != (tokens,):
                raise ValueError(
                    f"{self.key}: {name} of shape {array.shape}; allowed: ({tokens},), a grid of "
                    f"{self.grid[0]} x {self.grid[1]} tokens"
                )


def displayable(pixels_CHW: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.uint8]:
    """An image processor's normalised pixels as uint8 [H, W, 3]: exactly the part of the image that the tower sees."""
    pixels = pixels_CHW.detach().float().cpu().numpy().transpose(1, 2, 0)
    restored = pixels * np.asarray(std, dtype=np.float32) + np.asarray(mean, dtype=np.float32)
    return np.rint(restored.clip(0, 1) * 255).astype(np.uint8)


class ExampleStore:
    """Up to `limit` examples. Images are kept small: at most `max_pixels` on the longer side."""

    def __init__(self, *, limit: int = 12, max_pixels: int = 384) -> None:
        self.limit = limit
        self.max_pixels = max_pixels
        self._examples: list[RoutingExample] = []

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[RoutingExample]:
        yield from self._examples

    @property
    def is_full(self) -> bool:
        """Whether further examples would be left out."""
        return len(self) >= self.limit

    def add(
        self,
        trace: RoutingTrace,
        *,
        image_index: int,
        image: Image.Image | NDArray[np.uint8],
        grid: tuple[int, int],
        key: str,
        question: str,
        answer: str,
        prediction: str,
        foreground: NDArray[np.floating] | None = None,
    ) -> None:
        """Keep one image of a batch; nothing happens if the store is full.

        Args:
            trace: of the batch that the image is in (the prefill, in generation).
            image_index: its index in the batch, as in `image_BS`.
            image: as processed (see `displayable`), so that the grid lies on it.
            grid: rows and columns of its visual tokens.

        Raises:
            ValueError: the image is not in the batch, or the grid is not that of its tokens.
        """
        if self.is_full:
            return
        shown = image if isinstance(image, Image.Image) else Image.fromarray(image)
        shown = shown.convert("RGB")
        shown.thumbnail((self.max_pixels, self.max_pixels))
        self._examples.append(
            RoutingExample(
                key=key,
                question=question,
                answer=answer,
                prediction=prediction,
                image=np.array(shown),
                grid=grid,
                tail={site: flags.numpy() for site, flags in tail_by_site(trace, image_index).items()},
                foreground=None if foreground is None else np.asarray(foreground, dtype=np.float32),
            )
        )

    def to_npz(self, path: str | Path) -> None:
        """Write all examples to one .npz file (plain arrays: no pickle)."""
        arrays: dict[str, Any] = {"format": np.array(_FORMAT), "num_examples": np.array(len(self))}
        for index, example in enumerate(self):
            for name in _TEXTS:
                # As bytes: numpy's own strings lose zero characters at the end.
                arrays[f"{index}.{name}"] = np.frombuffer(getattr(example, name).encode(), dtype=np.uint8)
            arrays[f"{index}.image"] = example.image
            arrays[f"{index}.grid"] = np.array(example.grid)
            if example.foreground is not None:
                arrays[f"{index}.foreground"] = example.foreground
            for site, flags in example.tail.items():
                arrays[f"{index}.tail.{site.layer}.{site.part}"] = flags
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)

    @staticmethod
    def from_npz(path: str | Path) -> ExampleStore:
        """Read what `to_npz` wrote.

        Raises:
            ValueError: the file is none of ours, or of another format version.
        """
        with np.load(path, allow_pickle=False) as arrays:
            version = int(arrays["format"]) if "format" in arrays else None
            if version != _FORMAT or "num_examples" not in arrays:
                raise ValueError(f"{path}: routing examples of format {version}; allowed: {_FORMAT}")
            values = {name: arrays[name] for name in arrays.files}
        store = ExampleStore()
        store._examples = [_read_example(values, index) for index in range(int(values["num_examples"]))]
        store.limit = max(store.limit, len(store))
        return store


def _read_example(values: dict[str, NDArray], index: int) -> RoutingExample:
    """Example number `index` of an .npz file's arrays."""
    prefix = f"{index}.tail."
    tail = {}
    for name, flags in values.items():
        if name.startswith(prefix):
            layer, part = name.removeprefix(prefix).split(".", maxsplit=1)
            tail[Site(part, int(layer))] = flags
    rows, columns = (int(value) for value in values[f"{index}.grid"])
    texts = {name: values[f"{index}.{name}"].tobytes().decode() for name in _TEXTS}
    return RoutingExample(
        image=values[f"{index}.image"],
        grid=(rows, columns),
        tail=tail,
        foreground=values.get(f"{index}.foreground"),
        **texts,
    )
