"""Files of a pack: pictures, archives that come out the same each time, and weights at half their size."""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from moe_lvlm.data.packs.archive import MANIFEST

WEBP_QUALITY = 85


class HasImage(Protocol):
    """What is drawn with a picture."""

    @property
    def image(self) -> NDArray[np.uint8]: ...


Drawn = TypeVar("Drawn", bound=HasImage)


def draw_distinct(draw: Callable[[], Drawn], count: int, *, description: str) -> list[Drawn]:
    """So many of what `draw` gives, of which no two have the same image, in the order drawn."""
    drawn: dict[bytes, Drawn] = {}
    for _ in track(range(count), description=description):
        one = draw()
        while one.image.tobytes() in drawn:
            one = draw()
        drawn[one.image.tobytes()] = one
    return list(drawn.values())


def webp(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def decode(picture: bytes) -> torch.Tensor:
    """float32 [3, height, width] in -1..1, as the image processor gives it."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    return torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1


def write_zip(path: Path, members: Mapping[str, bytes], *, compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            # a fixed time, so that the same members make the same archive
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, compression)


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Save with weights in float16, half the size. The config still says float32, in which they are loaded."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    # save_file would leave a file that only its owner may read
    path.unlink()
    path.write_bytes(save(halves, metadata={"format": "pt"}))


def check_replaceable(parser: argparse.ArgumentParser, out: Path) -> None:
    """Stop with the parser's message if `out` holds something else than a pack: it would be deleted."""
    if out.exists() and not (out / MANIFEST).is_file():
        parser.error(f"--out {out} exists and is no pack; it would be deleted")


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A folder to build a pack in; it takes the place of `out` when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-") as scratch:
        pack = Path(scratch) / "pack"
        pack.mkdir()
        yield pack
        if out.exists():
            shutil.rmtree(out)
        pack.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out}: {size / 2**20:.2f} MiB")
