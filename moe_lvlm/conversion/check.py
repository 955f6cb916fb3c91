"""Judging a folder with a model: every byte, every tensor, and whether they make the model of its config.json.

`checkpoint.verify` judges the bytes of a checkpoint by themselves; here the model that they should be is known.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from moe_lvlm.checkpoint.base import read_base
from moe_lvlm.checkpoint.consistency import index_contradictions, state_contradictions
from moe_lvlm.checkpoint.files import Advance
from moe_lvlm.checkpoint.folder import list_checkpoints, read_latest
from moe_lvlm.checkpoint.fragments import persistent_buffers
from moe_lvlm.checkpoint.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    CheckpointError,
    Range,
    is_data_file,
)
from moe_lvlm.checkpoint.model_folder import CHECKSUMS_FILE
from moe_lvlm.checkpoint.reader import Checkpoint
from moe_lvlm.checkpoint.source import SAFETENSORS_FILE, SAFETENSORS_INDEX, WeightSource, open_source
from moe_lvlm.checkpoint.verify import (
    are_finite,
    file_problems,
    in_threads,
    read_manifest,
    read_records,
    value_problems,
    verify,
)
from moe_lvlm.models.build import build_empty, config_of
from moe_lvlm.models.config import MoELlavaConfig
from moe_lvlm.models.instructblip_config import MoEInstructBlipConfig
from moe_lvlm.models.load import CHECKPOINTS

Shapes = Mapping[str, tuple[int, ...]]
_EXPERTS = re.compile(r"\.experts\.[wb]\d$")
# What transformers raises on a config.json or on weights that it cannot make sense of.
_UNREADABLE = (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found out about a folder. problems: one sentence each, none if all is well.

    form: what the folder was taken for. files, bytes: how much it holds. is_quick: contents were not read.
    """

    path: Path
    form: Literal["checkpoint", "model folder", "adapters", "run"]
    problems: tuple[str, ...]
    files: int
    bytes: int
    seconds: float
    is_quick: bool


def find_folders(path: Path) -> list[Path]:
    """The folders that have to be judged one by one: all checkpoints of a run (newest first), or the path itself, and
    those below it that hold checksums of their own (an export of adapters, an InstructBLIP).

    A folder of checkpoints counts as its run. Raises ValueError if there is nothing to judge.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; allowed: a checkpoint, a run's folder, or a model's folder")
    directory = _checkpoints_of(path)
    if directory is not None:
        return [*list_checkpoints(directory), path]
    if _form(path) is None:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise ValueError(f"{path}: has {found}; allowed: a checkpoint, a run's folder, or a model's folder")
    return [path, *sorted(file.parent for file in path.rglob(CHECKSUMS_FILE) if file.parent != path)]


def bytes_to_read(path: Path, *, is_quick: bool) -> int:
    """What `check` tells its `advance` in all, if nothing is wrong: contents are read for checksums and for values."""
    if is_quick or _checkpoints_of(path) is not None:
        return 0
    is_hashed = any((path / name).is_file() for name in (MANIFEST_FILE, CHECKSUMS_FILE))
    files = [entry for entry in path.iterdir() if entry.is_file()]
    own = sum(file.stat().st_size * (is_hashed + (file.suffix == ".safetensors")) for file in files)
    try:
        base = read_base(path)
    except CheckpointError:  # `check` says so
        return own
    return own + (0 if base is None else sum(folder.num_bytes() for folder in base.folders))


def check(path: Path, *, is_quick: bool = False, advance: Advance = lambda num_bytes: None) -> Verdict:
    """Judge one folder: a checkpoint, a model folder, or what a run's folder says of its checkpoints.

    Looked at: the record of files (each with its size and checksum, none besides), the index (each tensor's ranges are
    there, once), names, shapes and experts against the model of config.json, masters, moments and steps against each
    other, the training state, and all values, which must be finite. is_quick: sizes instead of checksums, and no
    values; what remains takes a moment whatever the size. advance: told of the bytes read, from several threads.
    """
    started = time.monotonic()
    path = Path(path)
    form = "run" if _checkpoints_of(path) is not None else _form(path)
    if form is None:
        raise ValueError(f"{path}: neither a checkpoint, nor a run, nor a model's folder")
    judge = {
        "run": _run_problems,
        "checkpoint": _checkpoint_problems,
        "model folder": _model_folder_problems,
        "adapters": _adapter_problems,
    }[form]
    try:
        problems = tuple(judge(path, is_quick, advance))
    except (CheckpointError, OSError) as error:
        problems = (str(error),)
    files = [entry for entry in path.iterdir() if entry.is_file()]
    return Verdict(
        path=path,
        form=form,
        problems=problems,
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        seconds=time.monotonic() - started,
        is_quick=is_quick,
    )


def model_problems(config: MoELlavaConfig, shapes: Shapes) -> list[str]:
    """Where tensors, by name, are not those of the configuration's model: missing, unexpected, of another shape."""
    model = build_empty(config)
    tied = set(model.all_tied_weights_keys or {})
    expected = {name: tuple(tensor.shape) for name, tensor in _tensors_of(model)}
    problems = [f"{name}: missing" for name in sorted(expected.keys() - shapes.keys() - tied)]
    problems += [
        f"{name}: the model of {CONFIG_FILE} has no place for it"
        for name in sorted(shapes.keys() - expected.keys() - tied)
    ]
    for name in sorted(expected.keys() & shapes.keys()):
        if shapes[name] == expected[name]:
            continue
        moe = config.moe_config
        if _EXPERTS.search(name) and moe is not None and shapes[name][:1] != (moe.num_experts,):
            problems.append(f"{name}: {shapes[name][0]} experts, {CONFIG_FILE} says num_experts {moe.num_experts}")
        else:
            problems.append(
                f"{name}: shape {list(shapes[name])}, the model of {CONFIG_FILE} needs {list(expected[name])}"
            )
    return problems


def _tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from persistent_buffers(model)


def _checkpoints_of(path: Path) -> Path | None:
    """The folder of checkpoints if `path` is a run's folder, or that folder itself."""
    if (path / CHECKPOINTS).is_dir():
        return path / CHECKPOINTS
    return path if (path / LATEST_FILE).is_file() and not (path / INDEX_FILE).is_file() else None


def _form(path: Path) -> Literal["checkpoint", "model folder", "adapters"] | None:
    model_files = (CONFIG_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX, MANIFEST_FILE)
    if (path / CHECKSUMS_FILE).is_file() and not any((path / name).is_file() for name in model_files):
        return "adapters"  # an export's own folder, one of its adapters, a tokenizer: files without a model
    if (path / MANIFEST_FILE).is_file() or (path / INDEX_FILE).is_file():
        return "checkpoint"
    marks = (CHECKSUMS_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX)
    return "model folder" if any((path / mark).is_file() for mark in marks) else None


def _run_problems(path: Path, is_quick: bool, advance: Advance) -> Iterator[str]:
    """What concerns a run's checkpoints together: each of them is judged by itself."""
    directory = _checkpoints_of(path)
    assert directory is not None
    complete = [one.name for one in list_checkpoints(directory)]
    if not complete:
        yield f"{directory}: no complete checkpoint"
    latest = read_latest(directory)
    where = directory / LATEST_FILE
    if latest is None:
        yield f"{where}: missing, or not the name of a checkpoint"
    elif latest not in complete:
        yield f"{where}: names {latest!r}, which is not there; allowed: {', '.join(complete) or 'none is'}"
    for entry in sorted(directory.iterdir()):
        is_known = entry.name in complete or entry.name == LATEST_FILE
        if not is_known and entry.is_dir() and not entry.name.startswith("."):
            yield f"{entry}: not a complete checkpoint, {MANIFEST_FILE} is missing"


def _checkpoint_problems(path: Path, is_quick: bool, advance: Advance) -> Iterator[str]:
    problems = verify(path, is_hashed=not is_quick, advance=advance)
    yield from problems
    yield from _foreign_files(path, {entry.name for entry in path.iterdir() if is_data_file(entry.name)}, MANIFEST_FILE)
    if problems:
        return  # what damaged files say is of no interest
    checkpoint = Checkpoint(path)
    generators = sum(name.startswith("rng-") for name in read_manifest(path))
    found = index_contradictions(checkpoint.index)
    found += state_contradictions(checkpoint.state, checkpoint.index, num_generators=generators)
    found += _problems_with_config(path, checkpoint.shapes())
    yield from (f"{path}: {problem}" for problem in found)
    if not is_quick:
        yield from value_problems(path, advance=advance)


def _problems_with_config(path: Path, shapes: Shapes) -> list[str]:
    try:
        return model_problems(config_of(path), shapes)
    except _UNREADABLE as error:
        return [f"{CONFIG_FILE}: no model can be built: {_one_line(error)}"]


def _foreign_files(path: Path, known: set[str], where: str) -> Iterator[str]:
    for entry in sorted(path.iterdir()):
        # a folder below is judged by itself
        if entry.name not in known and not (entry.is_dir() and any(entry.rglob(CHECKSUMS_FILE))):
            yield f"{entry}: not named by {where}"


def _adapter_problems(path: Path, is_quick: bool, advance: Advance) -> Iterator[str]:
    """Of files beside no model: their checksums, nothing besides, and values that are finite."""
    records = read_records(path / CHECKSUMS_FILE)
    problems = file_problems(path, records, is_hashed=not is_quick, advance=advance, where=CHECKSUMS_FILE)
    yield from problems
    yield from _foreign_files(path, {*records, CHECKSUMS_FILE}, CHECKSUMS_FILE)
    if problems or is_quick:
        return
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    yield f"{file}: {name} holds values that are not finite"
        advance(file.stat().st_size)


def _model_folder_problems(path: Path, is_quick: bool, advance: Advance) -> Iterator[str]:
    where = path / CHECKSUMS_FILE
    if where.is_file():
        records = read_records(where)
        problems = file_problems(path, records, is_hashed=not is_quick, advance=advance, where=CHECKSUMS_FILE)
        yield from problems
        yield from _foreign_files(path, {*records, CHECKSUMS_FILE}, CHECKSUMS_FILE)
        if problems:
            return
    else:
        yield f"{where}: missing, so that no file's content can be compared (another program wrote this folder?)"
    source = open_source(path)
    try:
        shapes = {name: source.shape(name) for name in source.names()}
    except CheckpointError as error:
        yield str(error)
        return
    if (path / SAFETENSORS_INDEX).is_file():
        yield from _shard_problems(path, set(shapes))
    yield from (f"{path}: {problem}" for problem in _model_folder_contents(path, shapes))
    if not is_quick:
        yield from _value_problems(path, source, shapes, advance)


def _shard_problems(path: Path, names: set[str]) -> Iterator[str]:
    """Tensors that lie in a shard and are not in the index, where no program will find them."""
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in sorted(set(opened.keys()) - names):
                yield f"{file}: {name}: not named by {SAFETENSORS_INDEX}"


def _stock_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Transformers' own class for what `tools/export.py` writes as stock folders."""
    classes = (LlavaForConditionalGeneration, InstructBlipForConditionalGeneration)
    for one in classes:
        if type(config) is one.config_class:
            return one
    alone = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return alone if alone is not None and alone.__name__ in (config.architectures or ()) else None


def _model_folder_contents(path: Path, shapes: Shapes) -> list[str]:
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type in (MoELlavaConfig.model_type, MoEInstructBlipConfig.model_type):
            return model_problems(config_of(path), shapes)
        model_class = _stock_class(config)
        if model_class is None:
            return [
                f"{CONFIG_FILE}: model_type {config.model_type!r} is not compared with the tensors; "
                f"allowed: llava, instructblip, a language model, {MoELlavaConfig.model_type}, "
                f"{MoEInstructBlipConfig.model_type}"
            ]
        # transformers' own class and names: it knows its older spellings and how it takes experts apart
        _, found = model_class.from_pretrained(path, device_map="meta", output_loading_info=True)
    except _UNREADABLE as error:
        return [f"{CONFIG_FILE}: no model can be built: {_one_line(error)}"]
    said = {
        "missing_keys": "missing",
        "unexpected_keys": f"the model of {CONFIG_FILE} has no place for it",
        "mismatched_keys": f"another shape than the model of {CONFIG_FILE} needs",
    }
    return [f"{_key(key)}: {text}" for kind, text in said.items() for key in sorted(found[kind], key=_key)]


def _key(found: object) -> str:
    return str(found[0] if isinstance(found, tuple) else found)


def _value_problems(path: Path, source: WeightSource, shapes: Shapes, advance: Advance) -> list[str]:
    def problem(name: str, advance: Advance) -> str | None:
        rows = Range(0, shapes[name][0] if shapes[name] else 1, "", name)
        is_good = are_finite(lambda start, stop: source.read(name, start, stop), rows, advance, shapes[name][1:])
        return None if is_good else f"{path}: {name} holds values that are not finite"

    floating = [name for name in shapes if source.dtype(name).is_floating_point]
    return [one for one in in_threads(problem, floating, advance=advance) if one is not None]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
