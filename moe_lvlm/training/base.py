"""Which weights a run's checkpoints leave out: those that no stage has trained and that a folder of the recipe holds.

A weight is left out only if a folder holds it under its name and with its values, bit for bit: so nothing depends on how
the model was put together, and what was drawn, grown or cut from other weights is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import cached_file

from moe_lvlm.checkpoint.base import Base, BaseFolder, BaseTensor, read_base, record_folder
from moe_lvlm.checkpoint.folder import Log
from moe_lvlm.checkpoint.layout import INDEX_FILE, MANIFEST_FILE
from moe_lvlm.checkpoint.source import SAFETENSORS_FILE, SAFETENSORS_INDEX, WeightSource, open_source, source_files
from moe_lvlm.config.connector import QFormerConnectorSettings
from moe_lvlm.config.recipe import ModelSettings, Recipe
from moe_lvlm.data.packs import resolve
from moe_lvlm.models.load import find_model
from moe_lvlm.models.weights import expert_slice
from moe_lvlm.parallel.process_group import World

_CHUNK = 2**24  # elements that are compared at once
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder with weights. name: as the recipe has it. prefixes: of the model's names that may come from it."""

    name: str
    path: Path
    prefixes: tuple[str, ...]


def saves_frozen(recipe: Recipe) -> bool:
    """Whether the run's checkpoints hold all weights."""
    wanted = recipe.train.checkpoint.save_frozen
    return recipe.model.adapter is None if wanted is None else wanted


def plan_base(recipe: Recipe, model: nn.Module, checkpoint: Path | None, *, world: World, log: Log) -> Base | None:
    """What the checkpoints of a stage leave out; None: nothing. Every rank calls it, a collective.

    model: as the stage begins or goes on, whole or with this rank's experts, what it trains chosen. checkpoint: where its
    weights come from. What that leaves out, the stage leaves out unless it trains it; from anywhere else the first
    process compares the frozen weights with the recipe's folders, and hashes the files that hold them.

    Raises:
        ValueError: a folder that cannot be read.
    """
    if saves_frozen(recipe):
        return None
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = None if checkpoint is None else read_base(checkpoint)
    if before is not None:
        return before.only(frozen.keys())
    outcome: list[Base | Exception | None] = [None]
    if world.is_first:
        try:
            outcome = [find_base(recipe.model, frozen, log=log)]
        except (ValueError, OSError) as error:  # to be raised on all ranks
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    base = outcome[0]
    if isinstance(base, Exception):
        raise base
    return base


def find_base(settings: ModelSettings, frozen: Mapping[str, Tensor], *, log: Log) -> Base | None:
    """Where the recipe's folders hold frozen weights, by their names in the model; None if they hold none of them.

    frozen: of expert-parallel ones this rank's rows, which are those that are compared.
    """
    tensors: dict[str, BaseTensor] = {}
    folders: list[BaseFolder] = []
    for place in _places(settings):
        if not _has_weights(place.path):
            log(f"{place.path}: has no safetensors files, so checkpoints hold the weights that come from it")
            continue
        source = open_source(place.path)
        wanted = {
            name: tensor for name, tensor in frozen.items() if name.startswith(place.prefixes) and name not in tensors
        }
        found = dict(_matches(source, wanted))
        if not found:
            continue
        for name, theirs in found.items():
            tensors[name] = BaseTensor(len(folders), theirs, frozen[name].dtype, source.shape(theirs))
        folders.append(record_folder(place.path, source_files(place.path, set(found.values())), name=place.name))
    if not tensors:
        log("checkpoints hold all weights: the recipe's folders hold none of those that are not trained")
        return None
    base = Base(tuple(folders), tensors)
    log(
        f"checkpoints leave out {len(tensors)} weights ({base.num_bytes:,} bytes) that are not trained and lie in "
        f"{', '.join(folder.folder for folder in folders)}"
    )
    return base


def _places(settings: ModelSettings) -> Iterator[_Place]:
    if settings.from_pretrained is not None:
        yield _Place(settings.from_pretrained, find_model(settings.from_pretrained)[0], ("",))
        connector = settings.connector
        if isinstance(connector, QFormerConnectorSettings) and connector.text_from is not None:
            yield _Place(connector.text_from, Path(resolve(connector.text_from)), ("qformer.",))
        return
    parts = (
        (settings.vision_tower, ("model.vision_tower.",)),
        (settings.language_model, ("model.language_model.", "lm_head.")),
    )
    for part, prefixes in parts:
        if part is not None and part.from_pretrained is not None:
            yield _Place(part.from_pretrained, _part_folder(part.from_pretrained), prefixes)


def _part_folder(name: str) -> Path:
    """A part's folder: of a hub name the snapshot in the cache, which it has been read from."""
    path = resolve(name)
    if path.is_dir():
        return path
    config = cached_file(name, "config.json")
    assert config is not None, "transformers has read the part"
    return Path(config).parent


def _has_weights(path: Path) -> bool:
    return any((path / file).is_file() for file in (MANIFEST_FILE, INDEX_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX))


def _matches(source: WeightSource, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names here and in the source of the tensors that it holds bit for bit.

    Names may begin differently (`model.language_model.layers.0.` here, `model.layers.0.` there), but not from the first
    number on: what another layer or expert has is another weight.
    """
    theirs: dict[tuple[str, ...], list[str]] = {}
    for name in source.names():
        for end in _ends(name):
            theirs.setdefault(end, []).append(name)
    for name, tensor in tensors.items():
        longest: Sequence[str] = next((theirs[end] for end in _ends(name) if end in theirs), ())
        # a folder may hold two of them, such as CLIP's two towers
        for candidate in [name] if name in longest else longest:
            if _is_equal(source, candidate, tensor):
                yield name, candidate
                break


def _ends(name: str) -> Iterable[tuple[str, ...]]:
    """The dotted ends of a name, the longest first, that leave no number and more than a bare `weight`; and the name."""
    parts = tuple(name.split("."))
    yield parts
    for start in range(1, len(parts) - 1):
        if parts[start - 1].isdigit():
            return
        yield parts[start:]


def _is_equal(source: WeightSource, name: str, tensor: Tensor) -> bool:
    """Whether the source's tensor, in the other's type, has the other's bytes."""
    held = expert_slice(tensor)
    shape, first = source.shape(name), 0
    if held is not None:
        if shape[:1] != (held.total,):
            return False
        shape, first = (held.stop - held.start, *shape[1:]), held.start
    if shape != tuple(tensor.shape):
        return False
    if not shape:
        return _same_bytes(source.read(name), tensor)
    step = max(_CHUNK // max(tensor[:1].numel(), 1), 1)
    return all(
        _same_bytes(source.read(name, first + start, first + min(start + step, shape[0])), tensor[start : start + step])
        for start in range(0, shape[0], step)
    )


def _same_bytes(stored: Tensor, tensor: Tensor) -> bool:
    here = tensor.detach().to("cpu").reshape(-1)
    there = stored.to(here.dtype).reshape(-1)
    bits = _BITS[here.dtype.itemsize]
    return torch.equal(there.contiguous().view(bits), here.contiguous().view(bits))
