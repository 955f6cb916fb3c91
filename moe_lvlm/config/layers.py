"""A recipe made of layers: the files that it extends, the recipe itself, and a scale laid over them.

Three keys of a recipe's file are read here; none is a setting, and a resolved recipe holds none of them:

* `extends`: the recipe, fragment or file whose keys this file's are laid over.
* `scale`: the name of an overlay, laid over all that. It changes what a run costs and nothing that is studied.
* `scales`: what the overlay of a scale adds for this recipe and those that extend it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lvlm.config.errors import RecipeError, did_you_mean, shown
from moe_lvlm.config.files import base_path, list_scales, read_mapping

KeyPath = tuple[str | int, ...]

# What a scale may change. What a recipe studies (`moe`, of the connector its kind and experts, of the adapter all but its
# width and start) and how many machines it runs on (`parallel`) are the same at every scale, and so are the parts that a
# stage trains. Only the number of layers that hold the connector's experts goes with the size of a model.
_SCALED = ("model", "data", "train", "stages", "evaluation")
_SCALED_CONNECTOR = ("qformer", "text_from", "num_queries", "tokenizer", "max_text_length", "dropout", "experts")
_SCALED_EXPERTS = ("num_layers",)
_SCALED_ADAPTER = ("rank", "alpha", "start_from", "embedding_width", "num_clusters")
_SCALED_TRAIN = ("precision", "gradient_checkpointing", "optimizer", "schedule", "checkpoint", "log_every")
_SCALED_STAGE = ("steps", "epochs", "micro_batch", "global_batch", "learning_rate", "mixture", "template")


class Layers:
    """Keys and values laid over one another. data: what they come to. Remembers which layer each value is from."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self._sources: dict[KeyPath, str] = {}

    def lay(self, keys: Mapping[str, Any], source: str) -> None:
        """Lay a file's keys over what is there.

        Mappings merge key by key; all else replaces what it is laid over, and so does a mapping of another `kind`.
        `stages` as a mapping by name changes stages that are there.

        Raises:
            RecipeError: a stage that is not there.
        """
        self._merge((), self.data, keys, source)

    def note(self, path: KeyPath, source: str) -> None:
        """Remember that the value at a path, with all below it, is from `source`."""
        self._sources = {key: text for key, text in self._sources.items() if key[: len(path)] != path}
        self._sources[path] = source

    def source(self, path: KeyPath) -> str | None:
        """Where the value at a path, or the nearest one above it, is from."""
        above = (path[:length] for length in range(len(path), 0, -1))
        return next((self._sources[key] for key in above if key in self._sources), None)

    def _merge(self, path: KeyPath, below: dict[str, Any], above: Mapping[str, Any], source: str) -> None:
        for key, value in above.items():
            here = (*path, key)
            old = below.get(key)
            if here == ("stages",) and isinstance(value, dict):
                self._merge_stages(value, source)
            elif isinstance(value, dict) and isinstance(old, dict) and not _is_of_another_kind(value, old):
                self._merge(here, old, value, source)
            else:
                below[key] = value
                self.note(here, source)

    def _merge_stages(self, changes: Mapping[str, Any], source: str) -> None:
        stages = self.data.get("stages")
        if not isinstance(stages, list):
            raise RecipeError(
                f"{source}: stages: a mapping changes stages by name, and below this file there are none; allowed: a "
                "list, or `extends` with a recipe that has stages"
            )
        places = {str(stage.get("name")): place for place, stage in enumerate(stages) if isinstance(stage, dict)}
        for name, keys in changes.items():
            if name not in places:
                raise RecipeError(
                    f"{source}: stages.{name}: no such stage{did_you_mean(name, list(places))}; "
                    f"allowed: {', '.join(places)}"
                )
            if not isinstance(keys, dict):
                raise RecipeError(f"{source}: stages.{name}: {shown(keys)}; allowed: a mapping of keys to change")
            self._merge(("stages", places[name]), stages[places[name]], keys, source)


def _is_of_another_kind(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether `new` is another member of a union than `old`, whose keys would mean nothing in it."""
    return "kind" in new and "kind" in old and new["kind"] != old["kind"]


@dataclass(frozen=True, slots=True)
class _File:
    """A recipe's file. keys: what is left without `extends`, `scale` and `scales`."""

    path: Path
    keys: dict[str, Any]
    scale: Any
    scales: Any


def read_layers(path: Path, scale_override: tuple[Any, str] | None = None) -> Layers:
    """A recipe's file with all that it extends below it, and its scale laid over it.

    scale_override: the scale in place of the recipe's own, and how an error about it begins.

    Raises:
        RecipeError: a file that cannot be read, a base or a scale that there is not, a cycle, or a key that a scale
            may not change.
    """
    files = _chain(path)
    layers = Layers()
    for file in files:
        layers.lay(file.keys, str(file.path))
        _check_scales(file)
    chosen = _scale(files, scale_override)
    if chosen is None:
        return layers
    scale, where = chosen
    shipped = list_scales()
    allowed = sorted({*shipped, *(name for file in files for name in file.scales)})
    if scale not in allowed:
        raise RecipeError(f"{where}: {shown(scale)}{did_you_mean(str(scale), allowed)}; allowed: {', '.join(allowed)}")
    if scale in shipped:
        overlay = read_mapping(shipped[scale])
        _check_overlay(overlay, str(shipped[scale]))
        layers.lay(overlay, str(shipped[scale]))
    for file in files:
        layers.lay(file.scales.get(scale, {}), str(file.path))
    return layers


def _chain(path: Path) -> list[_File]:
    """The file and all that it extends, the lowest first."""
    files: list[_File] = []
    while True:
        trail = " -> ".join([*(str(file.path) for file in files), str(path)])
        if any(file.path.samefile(path) for file in files):
            raise RecipeError(f"{files[-1].path}: extends: a circle: {trail}")
        keys = read_mapping(path)
        base, scale, scales = keys.pop("extends", None), keys.pop("scale", None), keys.pop("scales", {})
        files.append(_File(path, keys, scale, scales))
        if base is None:
            return files[::-1]
        where = f"{path}: extends" if len(files) == 1 else f"{path}: extends ({trail})"
        path = base_path(base, path, where)


def _scale(files: Sequence[_File], override: tuple[Any, str] | None) -> tuple[Any, str] | None:
    """The scale to use and how an error about it begins, or None for a recipe of one size."""
    owner = next((file for file in reversed(files) if file.scale is not None), None)
    if override is None:
        return None if owner is None else (owner.scale, f"{owner.path}: scale")
    if owner is None:
        raise RecipeError(
            f"{override[1]}: {files[-1].path} has no key `scale`, it is written for one size; allowed: recipes that have "
            "one, and those that extend them"
        )
    return override


def _check_scales(file: _File) -> None:
    if not isinstance(file.scales, dict):
        raise RecipeError(f"{file.path}: scales: {shown(file.scales)}; allowed: a mapping by the scales' names")
    for name, overlay in file.scales.items():
        if not isinstance(overlay, dict):
            raise RecipeError(f"{file.path}: scales.{name}: {shown(overlay)}; allowed: a mapping of keys to values")
        _check_overlay(overlay, f"{file.path}: scales.{name}")


def _check_overlay(overlay: Mapping[str, Any], where: str) -> None:
    """Raises RecipeError for what a scale may not change, or not by such a value."""
    _check_keys(overlay, _SCALED, where, "")
    for group, keys in overlay.items():
        if not isinstance(keys, dict):
            raise RecipeError(f"{where}: {group}: {shown(keys)}; allowed in a scale: a mapping of keys to change")
    _check_parts(overlay.get("model", {}), where)
    _check_keys(overlay.get("train", {}), _SCALED_TRAIN, where, "train.")
    for name, keys in overlay.get("stages", {}).items():
        if isinstance(keys, dict):
            _check_keys(keys, _SCALED_STAGE, where, f"stages.{name}.")


def _check_parts(model: Mapping[str, Any], where: str) -> None:
    for path, allowed in (
        ("connector", _SCALED_CONNECTOR),
        ("connector.experts", _SCALED_EXPERTS),
        ("adapter", _SCALED_ADAPTER),
    ):
        here: Any = model
        for key in path.split("."):
            here = here.get(key, {})
        if not isinstance(here, dict):
            raise RecipeError(f"{where}: model.{path}: {shown(here)}; allowed in a scale: a mapping of keys to change")
        _check_keys(here, allowed, where, f"model.{path}.")


def _check_keys(keys: Iterable[str], allowed: Sequence[str], where: str, prefix: str) -> None:
    for key in keys:
        if key not in allowed:
            raise RecipeError(
                f"{where}: {prefix}{key}: a scale does not change this{did_you_mean(key, allowed)}; "
                f"allowed: {', '.join(prefix + word for word in allowed)}"
            )
