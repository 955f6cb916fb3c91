"""Writing a checkpoint: every rank its share, all or nothing.

Each rank writes what it owns into a temporary folder; rank 0 adds index, state and, last, the manifest; the folder is
renamed and `latest` replaced. Files and folders are fsynced before each of these steps. At the end of each phase all
ranks hear of every rank's failure and raise together, so that a full disk on one of them neither hangs the others nor
touches the previous checkpoint.

A save has two halves, so that the second one can run beside training (`background`): what to write is settled by the
ranks together; then it is written, published, and older checkpoints are let go.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_lvlm.checkpoint import layout
from moe_lvlm.checkpoint.base import Base
from moe_lvlm.checkpoint.documents import SLACK_BYTES, write_documents
from moe_lvlm.checkpoint.files import FileRecord, StreamedTensor, require_free_bytes, write_safetensors
from moe_lvlm.checkpoint.folder import Log, publish, retire, temporary_path, tidy
from moe_lvlm.checkpoint.fragments import Fragment, LiveTraining
from moe_lvlm.checkpoint.layout import Entry, Index, Kind, Range, check_name
from moe_lvlm.checkpoint.ranks import Ranks, SaveError, agree

_RESERVED = {"format_version", "engine", "learning_rates", "saved_world_size"}
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save wrote: the folder, the bytes of all its files over all ranks, and the time it took."""

    path: Path
    bytes: int
    seconds: float


class Owned(NamedTuple):
    """Identity of a fragment, and its bytes: equal on all ranks that hold the same one."""

    name: str
    kind: Kind
    start: int
    stop: int
    num_bytes: int


class Written(NamedTuple):
    """A fragment that a rank has written. All that rank 0 needs for the index."""

    name: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    step: float | None
    range: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSave:
    """A save that all ranks have begun: who writes what is settled, and there is room for it.

    fragments: what this rank writes. loads: bytes of fragments that each rank writes. state: all of state.json but its
    format version. base: where the weights are that are left out. started: when it began, on the monotonic clock.
    """

    directory: Path
    name: str
    fragments: Sequence[Fragment]
    loads: Sequence[int]
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    rng: Mapping[str, Tensor]
    base: Base | None
    started: float

    @property
    def temporary(self) -> Path:
        return temporary_path(self.directory, self.name)

    def copy_to_host(self) -> PreparedSave:
        """The same with this rank's fragments copied: training may go on while they are written."""
        copies = [replace(one, tensor=one.tensor.detach().to("cpu", copy=True)) for one in self.fragments]
        return replace(self, fragments=copies)


def save_checkpoint(
    directory: Path,
    name: str,
    training: LiveTraining,
    *,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    rng: Mapping[str, Tensor],
    ranks: Ranks,
    log: Log,
    base: Base | None = None,
    keep_last: int | None = None,
    protect: Collection[str] = (),
) -> SaveReport:
    """Write `directory`/`name` and make it the latest. Every rank calls it, at the same step.

    config: the model's configuration (JSON). state: the same on all ranks (JSON), with an int `global_step`.
    rng: this rank's generators (`capture_rng`). base: weights that are not trained and are left out, the same on all
    ranks; None leaves nothing out. keep_last: how many checkpoints stay besides those named in
    `protect`; None keeps all. Raises SaveError on all ranks, and leaves everything as it was, if any rank fails.
    """
    prepared = prepare_save(
        directory, name, training, config=config, state=state, rng=rng, ranks=ranks, log=log, base=base
    )
    return finish_save(prepared, ranks=ranks, log=log, keep_last=keep_last, protect=protect)


def prepare_save(
    directory: Path,
    name: str,
    training: LiveTraining,
    *,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    rng: Mapping[str, Tensor],
    ranks: Ranks,
    log: Log,
    base: Base | None = None,
) -> PreparedSave:
    """The first half of `save_checkpoint`, with its arguments: settle what each rank writes; nothing is written yet."""
    started = time.monotonic()
    directory = Path(directory)
    temporary = temporary_path(directory, check_name(name))
    with _removed_on_failure(temporary, ranks):
        fragments, everything = _together(
            ranks, "begin", lambda: _begin(directory, temporary, training, state, base, ranks, log)
        )
        replicated = [_owned(one) for one in fragments if one.is_replicated]
        plans = ranks.all_gather((replicated, sum(one.num_bytes for one in fragments if not one.is_replicated)))
        mine, loads = _together(ranks, "find room", lambda: _claim(fragments, plans, directory, ranks.rank))
    return PreparedSave(
        directory=directory,
        name=name,
        fragments=mine,
        loads=loads,
        config=config,
        state=everything,
        rng=rng,
        base=base,
        started=started,
    )


def finish_save(
    prepared: PreparedSave, *, ranks: Ranks, log: Log, keep_last: int | None = None, protect: Collection[str] = ()
) -> SaveReport:
    """The second half: write, publish, and let older ones go."""
    temporary = prepared.temporary
    with _removed_on_failure(temporary, ranks):
        written, records = _together(
            ranks, "write", lambda: _write_rank(temporary, ranks.rank, prepared.fragments, prepared.rng)
        )
        gathered = ranks.all_gather((written, records))
        total = _together(
            ranks,
            "write the index",
            lambda: _write_rest(temporary, prepared, gathered, ranks.rank),
        )
        _together(ranks, "publish", lambda: publish(prepared.directory, prepared.name) if ranks.rank == 0 else None)
    if ranks.rank == 0 and keep_last is not None:
        _retire(prepared.directory, keep_last, {*protect, prepared.name}, log)
    seconds = time.monotonic() - prepared.started
    return SaveReport(prepared.directory / prepared.name, ranks.all_gather(total)[0], seconds)


@contextmanager
def _removed_on_failure(temporary: Path, ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except SaveError:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # what stays is removed by the next save
        raise


def choose_writers(held: Sequence[Sequence[Owned]], load: Sequence[int]) -> tuple[dict[Owned, int], list[int]]:
    """Who writes each replicated fragment: of the ranks that hold it, the one with the fewest bytes so far.

    held: the replicated fragments of each rank. load: bytes that each rank writes anyway. Also returns what each rank
    writes in all.
    """
    holders: dict[Owned, list[int]] = {}
    for rank, fragments in enumerate(held):
        for fragment in fragments:
            holders.setdefault(fragment, []).append(rank)
    total = list(load)
    writers = {}
    for fragment in sorted(holders, key=lambda one: (-one.num_bytes, one)):
        writer = min(holders[fragment], key=lambda rank: (total[rank], rank))
        writers[fragment] = writer
        total[writer] += fragment.num_bytes
    return writers, total


def _together(ranks: Ranks, phase: str, work: Callable[[], _Result]) -> _Result:
    """Do this rank's part of a phase; SaveError on all ranks if it failed on any."""
    error: Exception | None = None
    result: _Result | None = None
    try:
        result = work()
    except Exception as caught:  # whatever it is, the other ranks wait to hear of it
        error = caught
    agree(ranks, error, phase)
    return result  # type: ignore[return-value]  # agree has raised if there is none


def _begin(
    directory: Path,
    temporary: Path,
    training: LiveTraining,
    state: Mapping[str, Any],
    base: Base | None,
    ranks: Ranks,
    log: Log,
) -> tuple[list[Fragment], dict[str, Any]]:
    if taken := _RESERVED & set(state):
        raise ValueError(f"state: keys {sorted(taken)} are written by save_checkpoint itself")
    if not isinstance(state.get("global_step"), int):
        raise ValueError(f"state: global_step is {state.get('global_step')!r}, must be an int")
    if ranks.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        tidy(directory, log)
        temporary.mkdir()
    everything = {
        "saved_world_size": ranks.world_size,
        "learning_rates": training.learning_rates(),
        "engine": training.facts(),
        **state,
    }
    return _without_base(training, base), everything


def _without_base(training: LiveTraining, base: Base | None) -> list[Fragment]:
    """This rank's fragments but for those of weights that are left out. ValueError if one of these is trained."""
    if base is None:
        return list(training.fragments())
    if unknown := base.tensors.keys() - set(training.names().values()):
        raise ValueError(f"base: {min(unknown)} is no parameter of the model")
    if trained := base.tensors.keys() & training.learning_rates().keys():
        raise ValueError(f"base: {min(trained)} is trained, and cannot be left out")
    return [fragment for fragment in training.fragments() if fragment.name not in base.tensors]


def _claim(
    fragments: Sequence[Fragment], plans: Sequence[tuple[Sequence[Owned], int]], directory: Path, rank: int
) -> tuple[list[Fragment], list[int]]:
    """The fragments that this rank writes, and the bytes of all. OSError if they do not fit on the disk."""
    writers, loads = choose_writers([replicated for replicated, _ in plans], [partitioned for _, partitioned in plans])
    require_free_bytes(directory, sum(loads) + SLACK_BYTES)
    return [one for one in fragments if not one.is_replicated or writers[_owned(one)] == rank], loads


def _owned(fragment: Fragment) -> Owned:
    return Owned(fragment.name, fragment.kind, fragment.start, fragment.stop, fragment.num_bytes)


def _write_rank(
    temporary: Path, rank: int, fragments: Sequence[Fragment], rng: Mapping[str, Tensor]
) -> tuple[list[Written], dict[str, FileRecord]]:
    file = layout.rank_file(rank)
    written = []
    for one in fragments:
        key = f"{one.name}:{one.kind}:{one.start}"
        piece = Range(one.start, one.stop, file, key)
        written.append(Written(one.name, one.kind, one.tensor.dtype, one.shape, one.step, piece))
    tensors = [StreamedTensor.of(entry.range.key, one.tensor) for entry, one in zip(written, fragments, strict=True)]
    generators = [StreamedTensor.of(key, tensor) for key, tensor in rng.items()]
    return written, {
        file: write_safetensors(temporary / file, tensors),
        layout.rng_file(rank): write_safetensors(temporary / layout.rng_file(rank), generators),
    }


def _write_rest(
    temporary: Path,
    prepared: PreparedSave,
    gathered: Sequence[tuple[Sequence[Written], Mapping[str, FileRecord]]],
    rank: int,
) -> int:
    """Rank 0 writes what concerns all. Returns the bytes of all files."""
    if rank != 0:
        return 0
    files = {file: record for _, records in gathered for file, record in records.items()}
    for file, record in files.items():
        if not (temporary / file).is_file() or (temporary / file).stat().st_size != record.size:
            raise OSError(f"{temporary / file}: rank 0 does not see what another rank wrote; use a shared file system")
    index = merge_index([entry for written, _ in gathered for entry in written])
    return write_documents(
        temporary, files, index=index, config=prepared.config, state=prepared.state, base=prepared.base
    )


def merge_index(written: Sequence[Written]) -> Index:
    """The index of what all ranks wrote. Raises ValueError on contradictions, holes and overlaps."""
    tensors: dict[str, dict[Kind, Entry]] = {}
    for one in written:
        kinds = tensors.setdefault(one.name, {})
        before = kinds.get(one.kind, Entry(dtype=one.dtype, shape=one.shape, ranges=(), step=one.step))
        if (before.dtype, before.shape, before.step) != (one.dtype, one.shape, one.step):
            raise ValueError(
                f"{one.name} ({one.kind}): ranks disagree: {before.dtype} {before.shape} step {before.step} against "
                f"{one.dtype} {one.shape} step {one.step}"
            )
        ranges = (*before.ranges, one.range)
        kinds[one.kind] = Entry(dtype=one.dtype, shape=one.shape, ranges=ranges, step=one.step)
    index = Index(tensors)
    if problems := index.problems():
        raise ValueError("; ".join(problems[:5]))
    return index


def _retire(directory: Path, keep_last: int, protect: Collection[str], log: Log) -> None:
    try:
        removed = retire(directory, keep_last, protect)
    except OSError as error:  # the new checkpoint is safe: no reason to end a run
        log(f"{directory}: old checkpoints could not be removed: {error}")
        return
    for name in removed:
        log(f"{directory / name}: removed, keep_last is {keep_last}")
