"""Build the quickstart's pack: scenes, questions, and two small parts that stand for pretrained ones.

Example:
    python tools/make_scenes_pack.py --emoji emoji --out moe_lvlm/data/packs/scenes
    python tools/make_scenes_pack.py --only-clusters --out moe_lvlm/data/packs/scenes --encoder all-MiniLM-L6-v2/

The emoji folder holds emoji_<style>_96.npz (`keys`: code points, `img`: uint8 [N, 96, 96, 4]) for twemoji, noto and
fluent_flat, and emoji_index.json. Takes about five minutes on one core. The data come out the same for the same
seed and library versions; the taught weights may differ in the last digits between machines. Clusters of instructions
need sentence-transformers and the encoder all-MiniLM-L6-v2 (--encoder says where it lies, if no hub can be reached).
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save
from scenes_records import caption_records, make_tokenizer, test_records, text_dialogues, train_records
from scenes_teaching import PATCH, SpecialIds, teach_language_model, teach_tower
from transformers import CLIPImageProcessor, PreTrainedModel

from moe_lvlm.data.clustering import count_instructions, fit_clusters
from moe_lvlm.data.encoder import DEFAULT_ENCODER, Encode, load_encoder
from moe_lvlm.data.packs.archive import FORMAT_VERSION, MANIFEST, write_manifest
from moe_lvlm.data.scenes import COLOURS, EMOJI, SIDE, STYLES, Scene, Sprites, compose_scene

VERSION = "2"
NUM_TRAIN = 6000
NUM_TEST = 450
WEBP_QUALITY = 85
# The questions are of so few kinds that the paper's 128 clusters would be more than there are distinct ones.
NUM_CLUSTERS = 8
CLUSTERS = "clusters.safetensors"
# of a patch's pixels: from here on it counts as showing the emoji rather than the ground
FOREGROUND = 0.3
LICENSES = """\
# Licences of the scenes pack

The images are composed of emoji from three sets, scaled down and placed on drawn grounds: sixteen emoji of each set.
The vision tower was taught with these images. Keep these attributions wherever the images go.

* Twemoji, copyright Twitter, Inc and other contributors: https://github.com/twitter/twemoji, taken from
  iconify-json/twemoji 1.2.5. Licence: CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/
* Noto Emoji, copyright Google: https://github.com/googlefonts/noto-emoji, taken from iconify-json/noto 1.2.9.
  Licence: Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0; its text is also moe_lvlm's LICENSE.
* Fluent Emoji (flat), copyright Microsoft Corporation: https://github.com/microsoft/fluentui-emoji, taken from
  iconify-json/fluent-emoji-flat 1.2.6. Licence: MIT, below.

Backgrounds, questions, tokenizer and weights were made for moe_lvlm and are under its licence.

clusters.safetensors holds means of embeddings of the questions, computed with all-MiniLM-L6-v2 by the authors of
Sentence Transformers: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2. Licence: Apache-2.0. The model
itself is not in the pack.

## Fluent Emoji

MIT License. Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    encode = load_encoder(arguments.encoder, device="cpu")  # at once: it may be missing
    if arguments.only_clusters:
        replace_clusters(arguments.out, encode, seed=arguments.seed)
        print(f"wrote {arguments.out / CLUSTERS} and {MANIFEST}")
        return
    sprites = load_sprites(arguments.emoji)
    train, test = compose(sprites, seed=arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent, prefix=".making-") as scratch:
        build(Path(scratch) / "pack", train, test, encode, arguments)
        if arguments.out.exists():
            shutil.rmtree(arguments.out)
        (Path(scratch) / "pack").rename(arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"wrote {arguments.out}: {size / 2**20:.2f} MiB")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, help="folder with emoji_<style>_96.npz, emoji_index.json")
    parser.add_argument("--out", type=Path, required=True, help="the pack's folder; an earlier pack there is replaced")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tower-steps", type=int, default=700)
    parser.add_argument("--language-steps", type=int, default=700)
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, help="folder or hub name of all-MiniLM-L6-v2")
    parser.add_argument(
        "--only-clusters", action="store_true", help=f"of the pack at --out replace {CLUSTERS} only; needs no emoji"
    )
    arguments = parser.parse_args()
    if (arguments.emoji is None) != arguments.only_clusters:
        parser.error("give exactly one of --emoji and --only-clusters")
    if arguments.only_clusters and not (arguments.out / MANIFEST).is_file():
        parser.error(f"--out {arguments.out} is no pack; --only-clusters needs one")
    if arguments.out.exists() and not (arguments.out / MANIFEST).is_file():
        parser.error(f"--out {arguments.out} exists and is no pack; it would be deleted")
    return arguments


def load_sprites(folder: Path) -> Sprites:
    """The pictures of EMOJI in each style. Raises ValueError if a file or a picture is missing."""
    index_path = folder / "emoji_index.json"
    if not index_path.is_file():
        raise ValueError(f"{index_path}: no such file")
    index = json.loads(index_path.read_text(encoding="utf-8"))
    sprites = {}
    for style in STYLES:
        path = folder / f"emoji_{style}_96.npz"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; all of {STYLES} are needed")
        with np.load(path) as archive:
            pictures = dict(zip(archive["keys"].tolist(), archive["img"], strict=True))
        missing = [f"{name} ({key})" for name, key in EMOJI.items() if key not in pictures or key not in index]
        if missing:
            raise ValueError(f"{path}: no picture of {', '.join(missing)}")
        sprites[style] = {name: pictures[key] for name, key in EMOJI.items()}
    return sprites


def compose(sprites: Sprites, *, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Training and held-out scenes; no image occurs twice."""
    rng = np.random.default_rng(seed)
    scenes: dict[bytes, Scene] = {}
    for _ in track(range(NUM_TRAIN + NUM_TEST), description="composing scenes"):
        scene = compose_scene(sprites, rng)
        while scene.image.tobytes() in scenes:
            scene = compose_scene(sprites, rng)
        scenes[scene.image.tobytes()] = scene
    ordered = list(scenes.values())
    return ordered[:NUM_TRAIN], ordered[NUM_TRAIN:]


def build(
    pack: Path, train: Sequence[Scene], test: Sequence[Scene], encode: Encode, arguments: argparse.Namespace
) -> None:
    """Write the whole pack into the new folder `pack`."""
    pack.mkdir()
    rng = np.random.default_rng([arguments.seed, 1])
    records = {
        "train.json": train_records(train, rng),
        "captions.json": caption_records(train),
        "test.json": test_records(test, rng),
    }
    pictures = {f"train/{index:05d}.webp": webp(scene.image) for index, scene in enumerate(train)}
    pictures |= {f"test/{index:05d}.webp": webp(scene.image) for index, scene in enumerate(test)}
    write_zip(pack / "images.zip", pictures, compression=zipfile.ZIP_STORED)
    masks = {f"masks/{index:05d}.png": one_bit_png(scene.mask) for index, scene in enumerate(test)}
    write_zip(pack / "masks.zip", masks, compression=zipfile.ZIP_STORED)
    texts = {name: json.dumps(rows, separators=(",", ":")).encode() for name, rows in records.items()}
    write_zip(pack / "records.zip", texts, compression=zipfile.ZIP_LZMA)

    tokenizer = make_tokenizer(
        turn["value"] for rows in records.values() for row in rows for turn in row["conversations"]
    )
    tokenizer.save_pretrained(pack / "language_model")
    # the tower learns from the images as they are stored, not as they were drawn
    images = torch.stack([decode(pictures[f"train/{index:05d}.webp"]) for index in range(len(train))])
    tower = teach_tower(
        images,
        patch_labels(train),
        num_classes=len(EMOJI) + len(COLOURS),
        steps=arguments.tower_steps,
        seed=arguments.seed,
    )
    save_half(tower, pack / "tower")
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(pack / "tower")
    language_model = teach_language_model(
        text_dialogues(train, records["train.json"], tokenizer),
        vocabulary=(len(tokenizer) + 7) // 8 * 8,
        special=SpecialIds(tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id),
        steps=arguments.language_steps,
        seed=arguments.seed,
    )
    save_half(language_model, pack / "language_model")
    (pack / "LICENSES.md").write_text(LICENSES, encoding="utf-8")
    facts = manifest_facts(records, len(train), len(test), len(tokenizer), arguments)
    write_manifest(pack, facts | {"clusters": write_clusters(pack, records, encode, seed=arguments.seed)})


def write_clusters(pack: Path, records: Mapping[str, list[dict[str, Any]]], encode: Encode, *, seed: int) -> str:
    """Write the table of clusters of what is trained on; returns what the manifest says of it. Test questions get the
    cluster whose centre is nearest."""
    counts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for name, rows in records.items():
        count_instructions(rows, others if name == "test.json" else counts)
    table = fit_clusters(counts, encode, encoder=DEFAULT_ENCODER, num_clusters=NUM_CLUSTERS, seed=seed, assigned=others)
    table.save(pack / CLUSTERS)
    return f"{table.num_clusters} of {len(table.ids_I)} instructions, encoded by {DEFAULT_ENCODER}"


def replace_clusters(pack: Path, encode: Encode, *, seed: int) -> None:
    """Write the table, the licences and the manifest of a pack that is there anew, and leave all else as it is."""
    with zipfile.ZipFile(pack / "records.zip") as archive:
        records = {name: json.loads(archive.read(name)) for name in archive.namelist()}
    facts = json.loads((pack / MANIFEST).read_text(encoding="utf-8"))
    if facts.pop("format_version") != FORMAT_VERSION:
        raise ValueError(f"{pack / MANIFEST}: another format_version than {FORMAT_VERSION}")
    del facts["files"]
    (pack / "LICENSES.md").write_text(LICENSES, encoding="utf-8")
    clusters = write_clusters(pack, records, encode, seed=seed)
    write_manifest(pack, facts | {"version": VERSION, "clusters": clusters})


def patch_labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """int64 [scenes, patches]: the emoji in each patch (its place in EMOJI), or len(EMOJI) + the colour's place."""
    names, colours = list(EMOJI), list(COLOURS)
    side = SIDE // PATCH
    labels = np.empty((len(scenes), side, side), dtype=np.int64)
    for index, scene in enumerate(scenes):
        labels[index] = len(names) + colours.index(scene.colour)
        share = scene.mask.reshape(side, PATCH, side, PATCH).mean((1, 3))
        for emoji in scene.emoji:
            column, row = (corner // PATCH for corner in emoji.quadrant.corner)
            quadrant = np.s_[row : row + side // 2, column : column + side // 2]
            labels[index][quadrant][share[quadrant] >= FOREGROUND] = names.index(emoji.name)
    return torch.from_numpy(labels).flatten(1)


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Save with weights in float16, half the size. The config still says float32, in which they are loaded."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    # save_file would leave a file that only its owner may read
    path.unlink()
    path.write_bytes(save(halves, metadata={"format": "pt"}))


def webp(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def one_bit_png(mask: NDArray[np.bool_]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def decode(picture: bytes) -> torch.Tensor:
    """float32 [3, SIDE, SIDE] in -1..1, as the image processor gives it."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    return torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1


def write_zip(path: Path, members: dict[str, bytes], *, compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            # a fixed time, so that the same members make the same archive
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, compression)


def manifest_facts(
    records: dict[str, list[dict[str, Any]]],
    num_train: int,
    num_test: int,
    num_tokens: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    return {
        "name": "scenes",
        "version": VERSION,
        "made_by": "tools/make_scenes_pack.py",
        "seed": arguments.seed,
        "counts": {
            "train_images": num_train,
            "test_images": num_test,
            "records": {name: len(rows) for name, rows in records.items()},
            "test_tasks": dict(Counter(row["task"] for row in records["test.json"])),
            "tokens": num_tokens,
        },
        "images": f"{SIDE} x {SIDE} pixels, WebP quality {WEBP_QUALITY}",
        "weights": "float16, to be loaded as float32",
        "tower": f"{arguments.tower_steps} steps on what each patch of the training images shows",
        "language_model": f"{arguments.language_steps} steps on the training conversations, captions for images",
    }


if __name__ == "__main__":
    main()
