"""Teach the two small parts of the scenes pack: a vision tower that knows what each patch shows, and a language model
that can answer questions about a scene that is told in words.

They stand for a pretrained tower and a pretrained language model: between random ones a short run learns nothing.
B images, P patches, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from moe_lvlm.data.scenes import COLOURS, EMOJI, SIDE, Scene

WIDTH = 96
PATCH = 8
BATCH = 64
LEARNING_RATE = 2e-3
WARMUP = 40
IGNORED = -100
# of a patch's pixels: from here on it counts as showing the emoji rather than the ground
FOREGROUND = 0.3

Tower = TypeVar("Tower", bound=nn.Module)


class Dialogue(NamedTuple):
    """Token ids from <s> on, and what is to be learnt: the same ids, or IGNORED."""

    ids: list[int]
    labels: list[int]


class PatchClasses(NamedTuple):
    """What a tower learns of each patch: a name, int64 labels [B, P], and the number of classes."""

    name: str
    labels: Tensor
    num_classes: int


class SpecialIds(NamedTuple):
    pad: int
    bos: int
    eos: int


def teach_tower(images: Tensor, labels: Tensor, *, num_classes: int, steps: int, seed: int) -> CLIPVisionModel:
    """Teach a ViT to name the content of each patch from its last hidden state.

    images: float32 [B, 3, SIDE, SIDE] in -1..1. labels: int64 [B, P], a class for each patch in reading order.
    """
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    tower = CLIPVisionModel(config)
    teach_patches(tower, patch_states, images, [PatchClasses("patches", labels, num_classes)], steps=steps)
    return tower.eval()


def teach_patches(
    tower: Tower,
    read: Callable[[Tower, Tensor], Tensor],
    images: Tensor,
    lessons: Sequence[PatchClasses],
    *,
    steps: int,
) -> None:
    """Train `tower` until linear heads on the states [B, P, WIDTH] that `read` gives know the classes of each patch."""
    heads = [nn.Linear(WIDTH, lesson.num_classes) for lesson in lessons]
    teacher = Teacher([*tower.parameters(), *(weight for head in heads for weight in head.parameters())], steps)
    for _ in track(range(steps), description="teaching the tower"):
        chosen = torch.randint(len(images), (BATCH,))
        states = read(tower, images[chosen])
        losses = [
            F.cross_entropy(head(states).flatten(0, 1), lesson.labels[chosen].flatten())
            for head, lesson in zip(heads, lessons, strict=True)
        ]
        teacher.step(torch.stack(losses).sum())
    with torch.no_grad():
        states = read(tower, images[:400])
    print(f"tower: loss {teacher.last_loss:.4f}; right on 400 training images:")
    for head, lesson in zip(heads, lessons, strict=True):
        right = head(states).argmax(-1) == lesson.labels[:400]
        print(f"  {lesson.name} {right.float().mean():.3f}")


def patch_states(tower: CLIPVisionModel, images: Tensor) -> Tensor:
    """What the connector will read: the last hidden state of each patch, [B, P, WIDTH]."""
    hidden: Tensor = tower(images, output_hidden_states=True).hidden_states[-1]
    return hidden[:, 1:]


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


def teach_language_model(
    dialogues: Sequence[Dialogue], *, vocabulary: int, special: SpecialIds, steps: int, seed: int
) -> LlamaForCausalLM:
    """Teach a Llama the dialogues, with the loss on their labels. vocabulary: the number of tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=special.pad,
        bos_token_id=special.bos,
        eos_token_id=special.eos,
    )
    model = LlamaForCausalLM(config)
    teacher = Teacher(model.parameters(), steps)
    for _ in track(range(steps), description="teaching the language model"):
        chosen = [dialogues[index] for index in torch.randint(len(dialogues), (BATCH,)).tolist()]
        ids_BS = pad([dialogue.ids for dialogue in chosen], special.pad)
        labels_BS = pad([dialogue.labels for dialogue in chosen], IGNORED)
        # padding stands at the end, where a causal model's earlier tokens never look
        teacher.step(model(input_ids=ids_BS, labels=labels_BS, use_cache=False).loss)
    print(f"language model: loss {teacher.last_loss:.4f}")
    return model.eval()


class Teacher:
    """AdamW with a linear warm-up and decay, and gradients clipped to norm 1."""

    def __init__(self, parameters: Iterable[nn.Parameter], steps: int, *, learning_rate: float = LEARNING_RATE) -> None:
        self.parameters = list(parameters)
        self.last_loss = float("nan")
        self.optimizer = AdamW(self.parameters, learning_rate, weight_decay=0.02)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1, (step + 1) / WARMUP) * max(0.03, 1 - step / steps)
        )

    def step(self, loss: Tensor) -> None:
        loss.backward()
        clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.last_loss = loss.item()


def pad(rows: Sequence[list[int]], value: int) -> Tensor:
    """Rows of one length, int64, filled up with `value` at their ends."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
