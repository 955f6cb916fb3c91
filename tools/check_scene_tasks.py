"""What can be learnt from the pack scene_tasks: tune the connector of one of its checkpoints on the four tasks.

Example:
    python tools/check_scene_tasks.py --pack moe_lvlm/data/packs/scene_tasks --model instructblip_t5 --steps 300

Plain PyTorch on the stock InstructBlipForConditionalGeneration, without anything of the trainer: query tokens, Q-Former
and projection learn, equal shares of the four tasks, AdamW, cosine. Scores are of the held-out pictures, by free greedy
generation: vqa and choice are the share of right answers; caption and ocr the share of true captions, and of captions
with the right names, or the right word. Takes about three minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pack_files import decode
from rich.progress import track
from scene_tasks_records import draw
from scene_tasks_teaching import NUM_QUERIES, freeze_all_but_connector
from scene_tasks_text import Exercise, Tokenizers, decode_answers, plain, prompt_batch, training_batch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import AutoTokenizer, InstructBlipForConditionalGeneration

from moe_lvlm.config.instructions import QMOE_SETS
from moe_lvlm.data.packs.archive import unpack_pack
from moe_lvlm.data.scenes import EMOJI

TASKS = ("caption", "vqa", "choice", "ocr")
BATCH = 64
WARMUP = 40
WEIGHT_DECAY = 0.05
EVALUATION_BATCH = 100
LONGEST_ANSWER = 32


class Item(NamedTuple):
    """question: None where the picture is to be captioned. kind: of question. answers: the right ones."""

    image: str
    question: str | None
    kind: str
    choices: list[str]
    answers: list[str]


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pack"
        unpack_pack(arguments.pack, folder)
        run(folder, arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="the pack's folder")
    parser.add_argument("--model", choices=("instructblip_llama", "instructblip_t5"), default="instructblip_t5")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Tune, and print scores before and after."""
    model = InstructBlipForConditionalGeneration.from_pretrained(folder / arguments.model, dtype=torch.float32)
    tokenizers = Tokenizers(
        AutoTokenizer.from_pretrained(folder / arguments.model),
        AutoTokenizer.from_pretrained(folder / arguments.model / "qformer_tokenizer"),
        closes_prompt=not model.config.use_decoder_only_language_model,
    )
    images = {path.name: decode(path.read_bytes()) for path in (folder / "images").iterdir()}
    held_out = read_items(folder, "val")
    print("before:", scores(model, tokenizers, images, held_out))
    began = time.perf_counter()
    tune(model, tokenizers, images, read_items(folder, "train"), arguments)
    print(f"{(time.perf_counter() - began) / arguments.steps:.3f} seconds a step")
    print("after:", scores(model, tokenizers, images, held_out))


def read_items(folder: Path, split: str) -> dict[str, list[Item]]:
    """The items of each task, from the published files."""
    questions = _load(folder / f"vqav2/v2_OpenEnded_mscoco_{split}2014_questions.json")["questions"]
    annotations = _load(folder / f"vqav2/v2_mscoco_{split}2014_annotations.json")["annotations"]
    coco = _load(folder / f"coco/captions_{split}2014.json")
    texts = defaultdict(list)
    for annotation in coco["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"])
    signs = {
        row["image_path"]: row["reference_strs"]
        for row in _load(folder / f"textcaps/TextCaps_0.1_{split}.json")["data"]
    }
    return {
        "caption": [Item(image["file_name"], None, "", [], texts[image["id"]]) for image in coco["images"]],
        "vqa": [
            Item(
                _image(split, question),
                question["question"],
                annotation["question_type"],
                [],
                [annotation["multiple_choice_answer"]],
            )
            for question, annotation in zip(questions, annotations, strict=True)
        ],
        "choice": [
            Item(
                _image(split, record),
                record["question"],
                " ".join(record["question"].split()[:2]),
                record["choices"],
                [record["choices"][record["correct_choice_idx"]]],
            )
            for record in _load(folder / f"aokvqa/aokvqa_v1p0_{split}.json")
        ],
        "ocr": [Item(image, None, "", [], references) for image, references in signs.items()],
    }


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _image(split: str, record: dict[str, Any]) -> str:
    return f"COCO_{split}2014_{record['image_id']:012d}.webp"


def exercise(item: Item, rng: np.random.Generator) -> Exercise:
    """The item under a random instruction, with a random one of its answers."""
    if item.question is None:
        instruction = draw(QMOE_SETS["caption"], rng)
        return Exercise(instruction, instruction, draw(item.answers, rng))
    template = draw(QMOE_SETS["choice" if item.choices else "vqa"], rng)
    instruction = template.format(QUESTION=item.question, CANDIDATES=", ".join(item.choices))
    return Exercise(item.question, instruction, draw(item.answers, rng))


def tune(
    model: InstructBlipForConditionalGeneration,
    tokenizers: Tokenizers,
    images: dict[str, torch.Tensor],
    items: dict[str, list[Item]],
    arguments: argparse.Namespace,
) -> None:
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    weights = freeze_all_but_connector(model)
    optimizer = AdamW(weights, arguments.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / arguments.steps)),
    )
    model.train()
    for step in track(range(arguments.steps), description="tuning"):
        chosen = [draw(items[task], rng) for task in TASKS for _ in range(BATCH // len(TASKS))]
        batch = training_batch([exercise(item, rng) for item in chosen], tokenizers, num_queries=NUM_QUERIES)
        loss = model(pixel_values=torch.stack([images[item.image] for item in chosen]), **batch).loss
        loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)


def scores(
    model: InstructBlipForConditionalGeneration,
    tokenizers: Tokenizers,
    images: dict[str, torch.Tensor],
    items: dict[str, list[Item]],
) -> str:
    model.eval()
    found = defaultdict(list)
    for task in TASKS:
        for item, text in zip(items[task], answer(model, tokenizers, images, items[task]), strict=True):
            found[task].append(plain(text) in [plain(right) for right in item.answers])
            if task == "caption":
                found["caption's names"].append(_names(text) == _names(item.answers[0]))
            elif task == "ocr":
                found["ocr's word"].append(item.answers[0].split()[-1] in text.split())
            else:
                found[f"{task}: {item.kind}"].append(found[task][-1])
    return ", ".join(f"{name} {np.mean(rights):.3f}" for name, rights in found.items())


def _names(caption: str) -> list[str]:
    return sorted(word for word in plain(caption).split() if word in EMOJI)


@torch.no_grad()
def answer(
    model: InstructBlipForConditionalGeneration,
    tokenizers: Tokenizers,
    images: dict[str, torch.Tensor],
    items: Sequence[Item],
) -> list[str]:
    """What the model says to each item, greedily."""
    texts = []
    for first in range(0, len(items), EVALUATION_BATCH):
        part = items[first : first + EVALUATION_BATCH]
        exercises = [exercise(item, np.random.default_rng(first + place)) for place, item in enumerate(part)]
        batch = prompt_batch(exercises, tokenizers, num_queries=NUM_QUERIES)
        pixels = torch.stack([images[item.image] for item in part])
        ids = model.generate(pixel_values=pixels, **batch, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        # a decoder-only model gives its prompt back too
        new = ids if tokenizers.closes_prompt else ids[:, batch["input_ids"].shape[1] :]
        texts += decode_answers(new, tokenizers)
    return texts


if __name__ == "__main__":
    main()
