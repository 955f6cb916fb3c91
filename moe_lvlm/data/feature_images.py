"""Which images a feature cache is made of: those of the records of some sources, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_lvlm.config.recipe import Recipe, SourceSettings
from moe_lvlm.data.errors import BadRecordError
from moe_lvlm.data.features import image_key
from moe_lvlm.data.mixture import Source


@dataclass(frozen=True, slots=True)
class CacheImage:
    """key: what it is called in a cache. root, path: where it lies, for `load_image`."""

    key: str
    root: Path
    path: str


def stage_sources(recipe: Recipe, stage: str | None) -> list[SourceSettings]:
    """The datasets of a stage, or of all stages (None), each once whatever its weight or ratio.

    Raises RecipeError: no stage of this name.
    """
    stages = recipe.stages if stage is None else recipe.stages[recipe.stage_index(stage) :][:1]
    sources = [source for one in stages for source in one.mixture or recipe.data.mixture]
    return list({source.model_dump_json(exclude={"weight", "ratio"}): source for source in sources}.values())


def find_images(
    sources: Iterable[Source], base: Path, advance: Callable[[int], None] = lambda count: None
) -> tuple[list[CacheImage], int]:
    """The images of all records in the order in which they first occur, and how many records are bad.

    base: the folder `data.image_root`. advance: told of each record.
    """
    found: dict[str, CacheImage] = {}
    num_bad = 0
    for source in sources:
        for index in range(len(source)):
            advance(1)
            try:
                record = source.record(index)
            except BadRecordError:
                num_bad += 1
                continue
            for path in record.images:
                key = image_key(base, source.image_root, path)
                found.setdefault(key, CacheImage(key, source.image_root, path))
    return list(found.values()), num_bad
