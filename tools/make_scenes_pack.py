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
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_art import ATTRIBUTIONS, FLUENT_LICENSE, load_sprites
from numpy.typing import NDArray
from pack_files import WEBP_QUALITY, check_replaceable, decode, draw_distinct, replaced, save_half, webp, write_zip
from PIL import Image
from scenes_records import caption_records, make_tokenizer, test_records, text_dialogues, train_records
from scenes_teaching import SpecialIds, patch_labels, teach_language_model, teach_tower
from transformers import CLIPImageProcessor

from moe_lvlm.data.clustering import count_instructions, fit_clusters
from moe_lvlm.data.encoder import DEFAULT_ENCODER, Encode, load_encoder
from moe_lvlm.data.packs.archive import FORMAT_VERSION, MANIFEST, write_manifest
from moe_lvlm.data.scenes import COLOURS, EMOJI, SIDE, Scene, Sprites, compose_scene

VERSION = "2"
NUM_TRAIN = 6000
NUM_TEST = 450
# The questions are of so few kinds that the paper's 128 clusters would be more than there are distinct ones.
NUM_CLUSTERS = 8
CLUSTERS = "clusters.safetensors"
LICENSES = f"""\
# Licences of the scenes pack

The images are composed of emoji from three sets, scaled down and placed on drawn grounds: sixteen emoji of each set.
The vision tower was taught with these images. Keep these attributions wherever the images go.

{ATTRIBUTIONS}
Backgrounds, questions, tokenizer and weights were made for moe_lvlm and are under its licence.

clusters.safetensors holds means of embeddings of the questions, computed with all-MiniLM-L6-v2 by the authors of
Sentence Transformers: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2. Licence: Apache-2.0. The model
itself is not in the pack.

{FLUENT_LICENSE}"""


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
    with replaced(arguments.out) as pack:
        build(pack, train, test, encode, arguments)


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
    check_replaceable(parser, arguments.out)
    return arguments


def compose(sprites: Sprites, *, seed: int) -> tuple[list[Scene], list[Scene]]:
    """Training and held-out scenes; no image occurs twice."""
    rng = np.random.default_rng(seed)
    ordered = draw_distinct(lambda: compose_scene(sprites, rng), NUM_TRAIN + NUM_TEST, description="composing scenes")
    return ordered[:NUM_TRAIN], ordered[NUM_TRAIN:]


def build(
    pack: Path, train: Sequence[Scene], test: Sequence[Scene], encode: Encode, arguments: argparse.Namespace
) -> None:
    """Write the whole pack into the empty folder `pack`."""
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


def one_bit_png(mask: NDArray[np.bool_]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


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
