"""Scenes: geometry worked by hand on sprites of one colour, and answers recomputed from the objects."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_lvlm.data.scenes import COLOURS, Quadrant, Scene, Sprites, Task, Texture, ask, compose_scene, describe

NAMES = ("ant", "bee", "cat", "dog")
# shades that no background reaches: green is 0 and blue 255
SHADES = {"ant": (0, 0, 255), "bee": (80, 0, 255), "cat": (160, 0, 255), "dog": (240, 0, 255)}
# the rows and columns in which a quadrant's emoji may lie: 24 pixels each way
SPANS = {
    "top left": (slice(0, 24), slice(0, 24)),
    "top right": (slice(0, 24), slice(24, 48)),
    "bottom left": (slice(24, 48), slice(0, 24)),
    "bottom right": (slice(24, 48), slice(24, 48)),
}


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    """Full squares, so that a mask of one emoji has 23 x 23 pixels and each pixel tells the name."""
    return {
        style: {name: np.full((96, 96, 4), (*SHADES[name], 255), np.uint8) for name in NAMES} for style in ("a", "b")
    }


@pytest.fixture(scope="module")
def scenes(sprites: Sprites) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [compose_scene(sprites, rng) for _ in range(300)]


def objects_in(image: NDArray[np.uint8]) -> dict[str, str]:
    """Place -> name, read from the pixels alone: the middle of each quadrant."""
    middles = {"top left": (12, 12), "top right": (12, 36), "bottom left": (36, 12), "bottom right": (36, 36)}
    by_shade = {shade: name for name, shade in SHADES.items()}
    seen = {place: by_shade.get(tuple(image[middle].tolist())) for place, middle in middles.items()}
    return {place: name for place, name in seen.items() if name is not None}


def test_the_mask_lies_exactly_where_the_emoji_were_drawn(scenes: list[Scene]) -> None:
    shades = np.array(list(SHADES.values()), np.uint8)
    for scene in scenes:
        is_emoji = (scene.image[:, :, None, :] == shades).all(-1).any(-1)
        np.testing.assert_array_equal(scene.mask, is_emoji)
        assert scene.mask.sum() == len(scene.emoji) * 23 * 23
        for emoji in scene.emoji:
            rows, columns = SPANS[emoji.quadrant]
            assert scene.mask[rows, columns].sum() == 23 * 23
            assert scene.mask[emoji.y : emoji.y + 23, emoji.x : emoji.x + 23].all()


def test_transparent_parts_of_an_emoji_are_ground() -> None:
    half = np.zeros((96, 96, 4), np.uint8)
    half[:48] = 255
    scene = compose_scene({"a": dict.fromkeys(NAMES, half)}, np.random.default_rng(0))
    emoji = scene.emoji[0]
    square = scene.mask[emoji.y : emoji.y + 23, emoji.x : emoji.x + 23]
    # 48 of 96 rows become 11.5 of 23
    assert square[:11].all()
    assert not square[13:].any()


def test_answers_agree_with_the_pixels(scenes: list[Scene]) -> None:
    number_words = {1: "one", 2: "two", 3: "three"}
    for scene in scenes:
        objects = objects_in(scene.image)
        occurrences = Counter(objects.values())
        expected = Counter(
            [
                ("background", "What color is the background?", scene.colour),
                ("count", "How many objects are there?", number_words[len(objects)]),
                *(("what", f"What is at the {place}?", name) for place, name in objects.items()),
                *(
                    ("where", f"Where is the {name}?", place)
                    for place, name in objects.items()
                    if occurrences[name] == 1
                ),
            ]
        )
        assert Counter((str(asked.task), asked.question, asked.answer) for asked in ask(scene)) == expected


def test_the_ground_of_a_plain_scene_has_the_colour_that_the_answer_names(scenes: list[Scene]) -> None:
    plain = [scene for scene in scenes if scene.texture is Texture.PLAIN]
    assert {scene.colour for scene in plain} == set(COLOURS)
    for scene in plain:
        assert (scene.image[~scene.mask] == COLOURS[scene.colour]).all()


def test_captions_are_sentences() -> None:
    sprites = {"a": {name: np.full((96, 96, 4), 255, np.uint8) for name in ("apple", "cat", "dog")}}
    rng = np.random.default_rng(3)
    scenes = [compose_scene(sprites, rng) for _ in range(200)]
    captions = {describe(scene): scene for scene in scenes}
    for caption, scene in captions.items():
        phrases = [f"{'an' if e.name == 'apple' else 'a'} {e.name} at the {e.quadrant}" for e in scene.emoji]
        listed = {1: "{}", 2: "{} and {}", 3: "{}, {} and {}"}[len(phrases)].format(*phrases)
        article = "an" if scene.colour == "orange" else "a"
        assert caption == "A" + f"{listed} on {article} {scene.colour} background."[1:]


def test_every_choice_occurs(scenes: list[Scene]) -> None:
    assert {len(scene.emoji) for scene in scenes} == {1, 2, 3}
    assert {scene.style for scene in scenes} == {"a", "b"}
    assert {scene.texture for scene in scenes} == set(Texture)
    assert {emoji.quadrant for scene in scenes for emoji in scene.emoji} == set(Quadrant)
    assert {asked.task for scene in scenes for asked in ask(scene)} == set(Task)
    corners = {(emoji.x % 24, emoji.y % 24) for scene in scenes for emoji in scene.emoji}
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_same_generator_state_gives_the_same_scene(sprites: Sprites) -> None:
    first = compose_scene(sprites, np.random.default_rng(11))
    again = compose_scene(sprites, np.random.default_rng(11))
    other = compose_scene(sprites, np.random.default_rng(12))
    np.testing.assert_array_equal(first.image, again.image)
    assert (first.emoji, first.colour, first.texture, first.style) == (
        again.emoji,
        again.colour,
        again.texture,
        again.style,
    )
    assert not np.array_equal(first.image, other.image)


def test_sprites_that_do_not_fit_together_are_refused(sprites: Sprites) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no style"):
        compose_scene({}, rng)
    with pytest.raises(ValueError, match=r"differ in \['dog'\]"):
        compose_scene({"a": sprites["a"], "b": {name: sprites["b"][name] for name in NAMES[:3]}}, rng)
    with pytest.raises(ValueError, match="2 names given"):
        compose_scene({"a": {name: sprites["a"][name] for name in NAMES[:2]}}, rng)
