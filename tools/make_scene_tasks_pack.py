"""Build the pack scene_tasks: four tasks in their published layouts, and two small InstructBLIP checkpoints.

Example:
    python tools/make_scene_tasks_pack.py --emoji emoji --out moe_lvlm/data/packs/scene_tasks

The emoji folder is that of tools/make_scenes_pack.py. Takes about twenty minutes on one core. The data come out the
same for the same seed and library versions; the taught weights may differ in the last digits between machines.
docs/scene_tasks.md says what the pack holds, and tools/check_scene_tasks.py what can be learnt from it.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_art import ATTRIBUTIONS, FLUENT_LICENSE, load_sprites
from pack_files import WEBP_QUALITY, check_replaceable, decode, draw_distinct, replaced, save_half, webp, write_zip
from scene_tasks_records import (
    Shown,
    choice_questions,
    object_captions,
    record_files,
    sign_captions,
    truths_file,
    web_captions,
)
from scene_tasks_teaching import NUM_QUERIES, assemble, teach_language_model, teach_qformer, teach_tower
from scene_tasks_text import make_tokenizers, vocabulary
from scene_tasks_truths import WORDS, Picture, compose_picture, draw_truth
from scenes_teaching import PATCH, patch_labels
from transformers import BlipImageProcessor, InstructBlipProcessor, InstructBlipVisionModel

from moe_lvlm.config.instructions import QMOE_SETS
from moe_lvlm.data.packs.archive import write_manifest
from moe_lvlm.data.scenes import COLOURS, EMOJI, SIDE, Sprites

VERSION = "1"
NUM_TRAIN = 2400
NUM_VAL = 600
FOLDERS = {"llama": "instructblip_llama", "t5": "instructblip_t5"}
# draws of scenes, after which no new word is met
NUM_SCENES_READ = 5000
# of a patch's pixels: from here on it counts as showing the sign
BOARD_SHARE = 0.3
LICENSES = f"""\
# Licences of the pack scene_tasks

The images are composed of emoji from three sets, scaled down and placed on drawn grounds: sixteen emoji of each set.
The models were taught with these images. Keep these attributions wherever the images go.

{ATTRIBUTIONS}
Backgrounds, signs, questions, captions, tokenizers and weights were made for moe_lvlm and are under its licence. The
records have the layouts of COCO Captions, VQAv2, A-OKVQA and TextCaps, and nothing of their content.

{FLUENT_LICENSE}"""


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    pictures = compose(load_sprites(arguments.emoji), seed=arguments.seed)
    with replaced(arguments.out) as pack:
        build(pack, pictures, arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder with emoji_<style>_96.npz, emoji_index.json")
    parser.add_argument("--out", type=Path, required=True, help="the pack's folder; an earlier pack there is replaced")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tower-steps", type=int, default=900)
    parser.add_argument("--llama-steps", type=int, default=1000)
    parser.add_argument("--t5-steps", type=int, default=800)
    parser.add_argument("--qformer-steps", type=int, default=400)
    arguments = parser.parse_args()
    check_replaceable(parser, arguments.out)
    return arguments


def compose(sprites: Sprites, *, seed: int) -> list[Picture]:
    """NUM_TRAIN + NUM_VAL pictures, of which no two are the same."""
    rng = np.random.default_rng(seed)
    return draw_distinct(lambda: compose_picture(sprites, rng), NUM_TRAIN + NUM_VAL, description="composing pictures")


def build(pack: Path, pictures: Sequence[Picture], arguments: argparse.Namespace) -> None:
    """Write the whole pack into the empty folder `pack`."""
    shown = [
        Shown(number, "train" if number <= NUM_TRAIN else "val", picture.truth)
        for number, picture in enumerate(pictures, 1)
    ]
    stored = {f"images/{one.file_name}": webp(picture.image) for one, picture in zip(shown, pictures, strict=True)}
    write_zip(pack / "images.zip", stored, compression=zipfile.ZIP_STORED)
    records = make_records(shown, seed=arguments.seed)
    texts = {name: json.dumps(content, separators=(",", ":")).encode() for name, content in records.items()}
    write_zip(pack / "records.zip", texts, compression=zipfile.ZIP_LZMA)

    # the parts learn from the images as they are stored, not as they were drawn
    images = torch.stack([decode(picture) for picture in list(stored.values())[:NUM_TRAIN]])
    tower = teach_tower(
        images,
        picture_labels(pictures[:NUM_TRAIN]),
        num_classes=len(EMOJI) + len(COLOURS) + len(WORDS),
        steps=arguments.tower_steps,
        seed=arguments.seed,
    )
    ids = vocabulary(known_texts(seed=arguments.seed))
    for kind, folder in FOLDERS.items():
        write_checkpoint(pack / folder, kind, tower, images, shown[:NUM_TRAIN], ids, arguments)
    (pack / "LICENSES.md").write_text(LICENSES, encoding="utf-8")
    write_manifest(pack, manifest_facts(records, len(ids), arguments))


def make_records(shown: Sequence[Shown], *, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 1])
    records: dict[str, Any] = {"truths.json": truths_file(shown)}
    for split in ("train", "val"):
        records |= record_files([one for one in shown if one.split == split], split, rng)
    return records


def known_texts(*, seed: int) -> set[str]:
    """Instructions, questions, answers and captions with every word that the pack knows."""
    rng = np.random.default_rng([seed, 4])
    texts = {template.format(QUESTION="", CANDIDATES="") for templates in QMOE_SETS.values() for template in templates}
    for _ in range(NUM_SCENES_READ):
        truth = draw_truth(rng)
        captions = [*web_captions(truth), *(object_captions(truth) if truth.sign is None else sign_captions(truth))]
        texts |= {caption.text for caption in captions}
        for asked in choice_questions(truth):
            texts |= {asked.question, asked.answer, *asked.wrong}
    return texts


def picture_labels(pictures: Sequence[Picture]) -> torch.Tensor:
    """int64 [pictures, patches]: patch_labels, or from there on the word of the sign that a patch shows."""
    labels = patch_labels([picture.scene for picture in pictures])
    side = SIDE // PATCH
    for row, picture in zip(labels, pictures, strict=True):
        if picture.sign is not None:
            share = torch.from_numpy(picture.board.reshape(side, PATCH, side, PATCH).mean((1, 3))).flatten()
            row[share >= BOARD_SHARE] = len(EMOJI) + len(COLOURS) + WORDS.index(picture.sign[0])
    return labels


def write_checkpoint(
    folder: Path,
    kind: str,
    tower: InstructBlipVisionModel,
    images: torch.Tensor,
    shown: Sequence[Shown],
    ids: dict[str, int],
    arguments: argparse.Namespace,
) -> None:
    """One folder in InstructBLIP's published layout."""
    tokenizers = make_tokenizers(ids, closes_prompt=kind == "t5")
    steps = {"llama": arguments.llama_steps, "t5": arguments.t5_steps}[kind]
    language_model = teach_language_model(kind, tokenizers, steps=steps, seed=arguments.seed)
    model = assemble(tower, language_model, tokenizers, seed=arguments.seed)
    truths = [one.truth for one in shown]
    teach_qformer(model, images, truths, tokenizers, steps=arguments.qformer_steps, seed=arguments.seed)
    save_half(model, folder)
    size = {"height": SIDE, "width": SIDE}
    processor = InstructBlipProcessor(
        image_processor=BlipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizers.language_model,
        qformer_tokenizer=tokenizers.qformer,
        num_query_tokens=NUM_QUERIES,
    )
    processor.save_pretrained(folder)


def manifest_facts(records: Mapping[str, Any], num_tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    rows = {"coco": "annotations", "vqav2": "questions", "aokvqa": None, "textcaps": "data", "truths.json": None}
    counts = {}
    for name, content in records.items():
        key = rows[name.split("/")[0]]
        if key is None or key in content:
            counts[name] = len(content if key is None else content[key])
    return {
        "name": "scene_tasks",
        "version": VERSION,
        "made_by": "tools/make_scene_tasks_pack.py",
        "seed": arguments.seed,
        "counts": {"train_images": NUM_TRAIN, "val_images": NUM_VAL, "records": counts, "tokens": num_tokens},
        "images": f"{SIDE} x {SIDE} pixels, WebP quality {WEBP_QUALITY}",
        "image_patterns": {
            "coco": "images/{file_name}",
            "vqav2": "images/COCO_{data_subtype}_{image_id:012d}.webp",
            "aokvqa": "images/COCO_{split}2014_{image_id:012d}.webp",
            "textcaps": "images/{image_id}.webp",
        },
        "weights": "float16, to be loaded as float32",
        "tower": f"{arguments.tower_steps} steps on what each patch of the training images shows, and where it lies",
        "language_models": f"{arguments.llama_steps} (llama) and {arguments.t5_steps} (t5) steps on all four tasks, "
        "phrases for images",
        "qformers": f"{arguments.qformer_steps} steps on captions of the training images; tower and language model frozen",
    }


if __name__ == "__main__":
    main()
