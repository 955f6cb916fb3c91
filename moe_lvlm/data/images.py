"""Images on disk: found below a root, opened with care."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from moe_lvlm.data.errors import RecordFault

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read (JPEG holds MPO). Pillow knows more, some of which start other programs (EPS)."""

MAX_PIXELS = 89_478_485
"""Pillow's own threshold for a decompression bomb, as a limit in place of a warning."""

MAX_ASPECT_RATIO = 200
"""Longer side over shorter: processors scale the shorter side up first, so a hair-thin image would fill the memory."""


def resolve_image(root: Path, path: str) -> Path:
    """The file that `path` names below `root`, links followed.

    Raises RecordFault if it leaves the root, by `..`, as an absolute path or through a link, or is not a file.
    """
    try:
        real_root = root.resolve()
        real = (real_root / path).resolve()
        inside, found = real.is_relative_to(real_root), real.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # name too long, NUL in it, a loop of links
        raise RecordFault(f"image {path!r} is not a usable path ({error})") from error
    if not inside:
        raise RecordFault(f"image {path!r} leaves the image root {root}; only files below it are allowed")
    if not found:
        raise RecordFault(f"image {path!r} is not a file below the image root {root}")
    return real


def load_image(root: Path, path: str) -> Image.Image:
    """The image as RGB, upright (EXIF orientation applied, as transformers does).

    Raises RecordFault if the path is not allowed (`resolve_image`) or the file is broken, truncated, not one of
    `FORMATS`, larger than `MAX_PIXELS` or thinner than `MAX_ASPECT_RATIO`.
    """
    file = resolve_image(root, path)
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(path, image.size)
            image.verify()  # checksums; the image cannot be used afterwards
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except RecordFault:
        raise
    except Exception as error:  # decoders given damaged bytes raise nearly every kind of exception
        detail = f"{type(error).__name__}: {error}"
        raise RecordFault(
            f"image {path!r} cannot be read ({detail}); allowed are whole {', '.join(FORMATS)} files"
        ) from error


def _check_size(path: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise RecordFault(f"image {path!r} is {width} x {height}; at most {MAX_PIXELS} pixels are allowed")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise RecordFault(
            f"image {path!r} is {width} x {height}; one side may be at most {MAX_ASPECT_RATIO} x the other"
        )
