"""Scenes to learn from on a CPU: one to three emoji on a coloured ground, with a foreground mask and questions.

A scene is SIDE x SIDE pixels and has four quadrants. Each emoji fills most of one quadrant, so that "what", "where"
and "how many" have one right answer, and the foreground mask says which pixels a router should find interesting.
Everything random comes from the NumPy generator that is handed in: the same generator state gives the same scene.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 48
SPRITE_SIDE = 23
JITTER = 1
MAX_OBJECTS = 3
SAME_NAME_SHARE = 0.4
# below this opacity (of 255) a pixel of an emoji counts as ground
OPAQUE = 96

Choice = TypeVar("Choice")
Sprites = Mapping[str, Mapping[str, NDArray[np.uint8]]]

STYLES = ("twemoji", "noto", "fluent_flat")
# the name that questions use, and the key (Unicode code point) of its picture in an emoji set
EMOJI = {
    "cat": "1f431",
    "dog": "1f436",
    "bear": "1f43b",
    "frog": "1f438",
    "pig": "1f437",
    "cow": "1f42e",
    "apple": "1f34e",
    "banana": "1f34c",
    "carrot": "1f955",
    "pizza": "1f355",
    "car": "1f697",
    "bus": "1f68c",
    "airplane": "2708",
    "house": "1f3e0",
    "key": "1f511",
    "star": "2b50",
}
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (245, 215, 66),
    "green": (60, 160, 80),
    "blue": (52, 96, 200),
    "purple": (130, 70, 180),
    "gray": (140, 140, 140),
    "white": (242, 242, 240),
}
NUMBERS = ("zero", "one", "two", "three")


class Texture(StrEnum):
    PLAIN = "plain"
    GRADIENT = "gradient"
    NOISY = "noisy"


class Task(StrEnum):
    """What a question asks for."""

    BACKGROUND = "background"
    COUNT = "count"
    WHAT = "what"
    WHERE = "where"


class Quadrant(StrEnum):
    """The four places of a scene, in reading order."""

    TOP_LEFT = "top left"
    TOP_RIGHT = "top right"
    BOTTOM_LEFT = "bottom left"
    BOTTOM_RIGHT = "bottom right"

    @property
    def corner(self) -> tuple[int, int]:
        """X and y of its upper left pixel."""
        half = SIDE // 2
        return (half if self.endswith("right") else 0, half if self.startswith("bottom") else 0)


@dataclass(frozen=True, slots=True)
class PlacedEmoji:
    """One emoji of a scene; x and y are the upper left pixel of its SPRITE_SIDE square."""

    name: str
    quadrant: Quadrant
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and the truth about it.

    image: uint8 [SIDE, SIDE, 3]. mask: bool [SIDE, SIDE], true on the emoji. emoji: in reading order.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    style: str
    colour: str
    texture: Texture
    emoji: tuple[PlacedEmoji, ...]


@dataclass(frozen=True, slots=True)
class Question:
    task: Task
    question: str
    answer: str


def compose_scene(sprites: Sprites, rng: np.random.Generator) -> Scene:
    """Draw one scene.

    sprites: style -> name -> uint8 RGBA [height, width, 4]; all styles need the same names, MAX_OBJECTS at least.

    Raises ValueError if the sprites do not fit together.
    """
    names = _shared_names(sprites)
    style = _choose(list(sprites), rng)
    colour = _choose(list(COLOURS), rng)
    texture = _choose(list(Texture), rng)
    placed = place_emoji(names, rng)

    canvas = Image.fromarray(draw_background(COLOURS[colour], texture, rng))
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    for emoji in placed:
        picture = Image.fromarray(sprites[style][emoji.name]).resize(
            (SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS
        )
        canvas.paste(picture, (emoji.x, emoji.y), picture)
        is_opaque = np.asarray(picture)[..., 3] > OPAQUE
        mask[emoji.y : emoji.y + SPRITE_SIDE, emoji.x : emoji.x + SPRITE_SIDE] |= is_opaque
    return Scene(np.asarray(canvas), mask, style, colour, texture, placed)


def ask(scene: Scene) -> tuple[Question, ...]:
    """Every question that the scene answers: the background, the count, what each place holds, and where each emoji
    is whose name occurs once."""
    questions = [
        Question(Task.BACKGROUND, "What color is the background?", scene.colour),
        Question(Task.COUNT, "How many objects are there?", NUMBERS[len(scene.emoji)]),
    ]
    occurrences = Counter(emoji.name for emoji in scene.emoji)
    for emoji in scene.emoji:
        questions.append(Question(Task.WHAT, f"What is at the {emoji.quadrant}?", emoji.name))
        if occurrences[emoji.name] == 1:
            questions.append(Question(Task.WHERE, f"Where is the {emoji.name}?", str(emoji.quadrant)))
    return tuple(questions)


def describe(scene: Scene) -> str:
    """A caption: "A cat at the top left and an apple at the top right on a blue background."."""
    phrases = [f"{_with_article(emoji.name)} at the {emoji.quadrant}" for emoji in scene.emoji]
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{listed[0].upper()}{listed[1:]} on {_with_article(scene.colour)} background."


def draw_background(colour: tuple[int, int, int], texture: Texture, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The ground, uint8 [SIDE, SIDE, 3]: `colour` that passes into a darker shade of it (lighter, if it is dark)."""
    base = np.array(colour, dtype=np.float32)
    shade = base * (0.55 + 0.25 * rng.random()) if base.mean() > 90 else base + 60
    amount = _texture_amount(texture, rng)
    return np.clip(base + (shade - base) * amount[..., None], 0, 255).astype(np.uint8)


def _texture_amount(texture: Texture, rng: np.random.Generator) -> NDArray[np.float32]:
    """How much of the shade each pixel takes: float32 [SIDE, SIDE] in 0..1."""
    if texture is Texture.PLAIN:
        return np.zeros((SIDE, SIDE), dtype=np.float32)
    if texture is Texture.GRADIENT:
        y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
        angle = rng.random() * 2 * np.pi
        amount = np.cos(angle) * x + np.sin(angle) * y
    else:
        amount = np.zeros((SIDE, SIDE), dtype=np.float32)
        for octave in range(3):
            coarse = rng.random((4 * 2**octave,) * 2).astype(np.float32)
            fine = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            amount = amount + np.asarray(fine) / 2**octave
    amount = amount - amount.min()
    return (amount / amount.max()).astype(np.float32)


def place_emoji(names: Sequence[str], rng: np.random.Generator) -> tuple[PlacedEmoji, ...]:
    """One to MAX_OBJECTS emoji in quadrants of their own, in reading order; in SAME_NAME_SHARE of the cases of one name."""
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    quadrants = [list(Quadrant)[index] for index in sorted(rng.permutation(len(Quadrant))[:count])]
    chosen = [names[index] for index in rng.permutation(len(names))[:count]]
    if rng.random() < SAME_NAME_SHARE:
        chosen = chosen[:1] * count
    placed = []
    for name, quadrant in zip(chosen, quadrants, strict=True):
        shift_x, shift_y = rng.integers(0, JITTER + 1, size=2)
        placed.append(PlacedEmoji(name, quadrant, quadrant.corner[0] + int(shift_x), quadrant.corner[1] + int(shift_y)))
    return tuple(placed)


def _shared_names(sprites: Sprites) -> list[str]:
    if not sprites:
        raise ValueError("sprites: no style given")
    first_style, first = next(iter(sprites.items()))
    for style, pictures in sprites.items():
        if pictures.keys() != first.keys():
            different = sorted(pictures.keys() ^ first.keys())
            raise ValueError(
                f"sprites: styles {first_style} and {style} differ in {different}; give both the same names"
            )
    if len(first) < MAX_OBJECTS:
        raise ValueError(f"sprites: {len(first)} names given, a scene needs {MAX_OBJECTS} at least")
    return list(first)


def _choose(values: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return values[int(rng.integers(len(values)))]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
