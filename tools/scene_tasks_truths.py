"""Scenes with signs: what the pack scene_tasks shows, and the truth about each picture.

A picture is a scene of moe_lvlm/data/scenes.py. Half of them have a sign with one word on it, in a quadrant that holds
no emoji. Everything random comes from the NumPy generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lvlm.data.scenes import COLOURS, EMOJI, SIDE, Quadrant, Scene, Sprites, compose_scene, place_emoji

# five columns and seven rows of dots a letter
GLYPHS = {
    "a": ".###. #...# #...# ##### #...# #...# #...#",
    "e": "##### #.... #.... ####. #.... #.... #####",
    "h": "#...# #...# #...# ##### #...# #...# #...#",
    "i": ".###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.",
    "k": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "l": "#.... #.... #.... #.... #.... #.... #####",
    "m": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "n": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "o": ".###. #...# #...# #...# #...# #...# .###.",
    "p": "####. #...# #...# ####. #.... #.... #....",
    "r": "####. #...# #...# ####. #.#.. #..#. #...#",
    "s": ".#### #.... #.... .###. ....# ....# ####.",
    "t": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "u": "#...# #...# #...# #...# #...# #...# .###.",
    "v": "#...# #...# #...# #...# #...# .#.#. ..#..",
    "x": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
}
# some differ in one letter only, so that they must be read
WORDS = ("exit", "menu", "open", "oven", "park", "part", "sale", "salt", "shop", "stop", "tax", "taxi")
SIGN_SHARE = 0.5
# width and height
BOARD_SIZE = (24, 13)
# ink and board
PAINTS = (
    ((0, 0, 0), (255, 255, 255)),
    ((255, 255, 255), (0, 0, 0)),
    ((200, 20, 30), (255, 255, 255)),
    ((255, 235, 60), (20, 30, 90)),
)


@dataclass(frozen=True, slots=True)
class Truth:
    """What a picture shows. emoji: names and places in reading order. sign: its word and place."""

    colour: str
    emoji: tuple[tuple[str, Quadrant], ...]
    sign: tuple[str, Quadrant] | None

    def as_json(self) -> dict[str, Any]:
        return {
            "background": self.colour,
            "objects": [{"name": name, "place": str(quadrant)} for name, quadrant in self.emoji],
            "sign": None if self.sign is None else {"word": self.sign[0], "place": str(self.sign[1])},
        }


def draw_truth(rng: np.random.Generator) -> Truth:
    """The truth of a picture that is not drawn, with the shares that drawn ones have."""
    emoji = tuple((placed.name, placed.quadrant) for placed in place_emoji(list(EMOJI), rng))
    return Truth(list(COLOURS)[rng.integers(len(COLOURS))], emoji, _draw_sign({place for _, place in emoji}, rng))


@dataclass(frozen=True, slots=True)
class Picture:
    """image: uint8 [SIDE, SIDE, 3], the scene with the sign on it. board: bool [SIDE, SIDE], true where the sign is."""

    image: NDArray[np.uint8]
    board: NDArray[np.bool_]
    scene: Scene
    sign: tuple[str, Quadrant] | None

    @property
    def truth(self) -> Truth:
        emoji = tuple((placed.name, placed.quadrant) for placed in self.scene.emoji)
        return Truth(self.scene.colour, emoji, self.sign)


def compose_picture(sprites: Sprites, rng: np.random.Generator) -> Picture:
    """Draw a scene, with a sign on it in SIGN_SHARE of the cases."""
    scene = compose_scene(sprites, rng)
    sign = _draw_sign({placed.quadrant for placed in scene.emoji}, rng)
    image, board = scene.image.copy(), np.zeros((SIDE, SIDE), dtype=bool)
    if sign is not None:
        word, quadrant = sign
        width, height = BOARD_SIZE
        x, y = quadrant.corner
        x += int(rng.integers(SIDE // 2 - width + 1))
        y += int(rng.integers(SIDE // 2 - height + 1))
        ink, paint = PAINTS[rng.integers(len(PAINTS))]
        board[y : y + height, x : x + width] = True
        image[board] = paint
        dots = draw_word(word)
        left, top = x + (width - dots.shape[1]) // 2, y + (height - dots.shape[0]) // 2
        image[top : top + dots.shape[0], left : left + dots.shape[1]][dots] = ink
    return Picture(image, board, scene, sign)


def _draw_sign(taken: Set[Quadrant], rng: np.random.Generator) -> tuple[str, Quadrant] | None:
    """A word and a quadrant that is not taken, or no sign."""
    if rng.random() >= SIGN_SHARE:
        return None
    free = [quadrant for quadrant in Quadrant if quadrant not in taken]
    return WORDS[rng.integers(len(WORDS))], free[rng.integers(len(free))]


def draw_word(word: str) -> NDArray[np.bool_]:
    """The dots of a word, bool [7, 6 * letters - 1]: its letters with an empty column between them."""
    gap = np.zeros((7, 1), dtype=bool)
    columns = []
    for letter in word:
        rows = [[dot == "#" for dot in row] for row in GLYPHS[letter].split()]
        columns += [np.array(rows, dtype=bool), gap]
    return np.concatenate(columns[:-1], axis=1)
