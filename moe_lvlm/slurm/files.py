"""Files that a recipe names: looked for before a job waits hours in a queue for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_lvlm.config.recipe import Recipe
from moe_lvlm.config.records import RecordsSettings

_SHIPPED = "package:"


def missing_files(recipe: Recipe, directory: Path) -> list[str]:
    """A sentence for each file of records and each folder of a model that is not there; relative paths are below `directory`.

    What may be a name on a model hub (`openai/clip-vit-large-patch14-336`) is not judged.
    """
    named = dict.fromkeys([*_records(recipe), *_models(recipe)])
    return [f"{key}: {path}: no such file or folder" for key, path in named if not (directory / path).exists()]


def _records(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    data = recipe.data
    lists: list[tuple[str, tuple[RecordsSettings, ...]]] = [
        (f"stages.{place}.mixture" if stage.mixture else "data.mixture", stage.mixture or data.mixture)
        for place, stage in enumerate(recipe.stages)
    ]
    for key, records in lists:
        for index, one in enumerate(records):
            for field, value in (("path", one.path), ("annotations", one.annotations), ("ocr_tokens", one.ocr_tokens)):
                if value is not None and (path := _local(value, data.image_root)) is not None:
                    yield f"{key}.{index}.{field}", path
    if data.clusters is not None and (path := _local(data.clusters, data.image_root)) is not None:
        yield "data.clusters", path


def _models(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    model = recipe.model
    tower, language_model = model.vision_tower, model.language_model
    parts = {
        "model.from_pretrained": model.from_pretrained,
        "model.vision_tower.from_pretrained": None if tower is None else tower.from_pretrained,
        "model.language_model.from_pretrained": None if language_model is None else language_model.from_pretrained,
        "model.tokenizer": model.tokenizer,
    }
    for key, value in parts.items():
        if value is not None and value.startswith(("/", "./", "../")):
            yield key, Path(value)


def _local(path: str, base: str) -> Path | None:
    """Where a file of records lies; None for what the package ships."""
    if path.startswith(_SHIPPED) or (base.startswith(_SHIPPED) and not Path(path).is_absolute()):
        return None
    return Path(path) if base.startswith(_SHIPPED) else Path(base) / path
