from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from PIL import Image

from moe_lvlm.data.errors import RecordFault
from moe_lvlm.data.images import load_image, resolve_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 6), (1, 2, 3)).save(folder / "sub" / "a.png")
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "secret.png")
    return folder


def test_paths_below_the_root_are_found(root: Path) -> None:
    (root / "link.png").symlink_to(root / "sub" / "a.png")
    for path in ("sub/a.png", "sub/../sub/a.png", str(root / "sub" / "a.png"), "link.png"):
        assert load_image(root, path).getpixel((0, 0)) == (1, 2, 3)


def test_paths_that_leave_the_root_are_refused(root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    for path in ("../secret.png", str(root.parent / "secret.png"), "link.png", "folder/secret.png", "/etc/passwd"):
        with pytest.raises(RecordFault, match="leaves the image root"):
            resolve_image(root, path)


def test_what_is_no_file_is_refused(root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    for path in ("none.png", "sub", "loop", "pipe", "nul\0.png", "n" * 5000):
        with pytest.raises(RecordFault, match=r"is not a (file|usable path)"):
            resolve_image(root, path)


def test_broken_images_are_refused(root: Path) -> None:
    whole = root / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    data = whole.read_bytes()
    png = (root / "sub" / "a.png").read_bytes()
    contents = {
        "cut.jpg": data[: len(data) // 2],
        "cut.png": png[:-20],
        "flipped.png": png[:45] + bytes([png[45] ^ 1]) + png[46:],
        "text.png": b"no image",
        "empty.png": b"",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
        with pytest.raises(RecordFault, match=f"image '{name}' cannot be read"):
            load_image(root, name)


def test_bombs_and_threads_are_refused(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for side in (9_500, 13_500):  # above Pillow's threshold for a warning, and for an error
            Image.new("1", (side, side)).save(root / "bomb.png")
            with pytest.raises(RecordFault, match=r"bomb\.png"):
                load_image(root, "bomb.png")
    Image.new("1", (201, 1)).save(root / "thread.png")
    with pytest.raises(RecordFault, match="201 x 1; one side"):
        load_image(root, "thread.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(root: Path, mode: str) -> None:
    Image.new(mode, (5, 4)).save(root / "image.tiff")
    image = load_image(root, "image.tiff")
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("format", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_formats_that_are_read(root: Path, format: str) -> None:
    Image.new("RGB", (5, 4), (9, 9, 9)).save(root / "image", format)
    assert load_image(root, "image").size == (5, 4)


def test_images_stand_upright(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    Image.new("RGB", (10, 4)).save(root / "turned.jpg", exif=exif)
    assert load_image(root, "turned.jpg").size == (4, 10)
