"""The size to which an image will be processed, without decoding it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.images import FORMATS, MAX_ASPECT_RATIO, MAX_PIXELS, resolve_image

Size = tuple[int, int]

# A processor that makes one size of these makes it of any image: they differ in shape and in scale.
_PROBES: tuple[Size, ...] = ((64, 192), (192, 64), (448, 448))
_EXIF_ORIENTATION = 0x0112
_FIRST_SIDEWAYS = 5  # orientations 5 to 8 swap the sides


class ImageSizes:
    """Processed sizes: one for all where the processor crops or resizes to it, else by the size in an image's header.

    process: an RGB image to [C, H, W].
    """

    def __init__(self, process: Callable[[Image.Image], Tensor]) -> None:
        self._process = process
        self._of_original: dict[Size, Size] = {}
        self._fixed: Size | None = None
        self._is_probed = False

    def processed(self, root: Path, path: str) -> Size:
        """(height, width). Where one size holds for all the file is not looked at.

        Raises:
            RecordFault: the file is not there, not an image, or too large or thin to be loaded.
        """
        if not self._is_probed:
            found = {self._blank(size) for size in _PROBES}
            self._fixed = found.pop() if len(found) == 1 else None
            self._is_probed = True
        return self._blank(_header_size(root, path)) if self._fixed is None else self._fixed

    def _blank(self, original: Size) -> Size:
        """The processed (height, width) of an image of this (width, height)."""
        if original not in self._of_original:
            height, width = self._process(Image.new("RGB", original)).shape[-2:]
            self._of_original[original] = height, width
        return self._of_original[original]


def _header_size(root: Path, path: str) -> Size:
    """(width, height), upright."""
    file = resolve_image(root, path)
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            is_sideways = image.getexif().get(_EXIF_ORIENTATION, 1) >= _FIRST_SIDEWAYS
    except Exception as error:  # decoders given damaged bytes raise nearly every kind of exception
        raise RecordFault(f"image {path!r} cannot be read ({type(error).__name__}: {error})") from error
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RecordFault(f"image {path!r} is {width} x {height}, too large or too thin to be loaded")
    return (height, width) if is_sideways else (width, height)
