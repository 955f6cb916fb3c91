"""Datasets, and a mixture of them with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import LlavaProcessor

from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import DataSettings, SourceSettings
from moe_lvlm.data import packs
from moe_lvlm.data.clusters import ClusterTable, InstructionClusters
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.errors import BadRecordError, DataFileError, RecordFault
from moe_lvlm.data.llava_json import RecordFile, read_records
from moe_lvlm.data.records import Record, parse_record, record_id
from moe_lvlm.data.sample import NumImageTokens, Prompt, Sample, SampleBuilder, check_processor
from moe_lvlm.data.tasks import TaskRules
from moe_lvlm.data.templates import build_template


class Draw(NamedTuple):
    """A place in the endless stream of epochs: 0 <= position < size of an epoch."""

    epoch: int
    position: int


@dataclass(frozen=True)
class Source:
    """One dataset: a file of records and the folder that their images lie below."""

    name: str
    records: RecordFile
    image_root: Path

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        """The name of a sample: `<dataset>/<index>`."""
        return f"{self.name}/{index}"

    def record(self, index: int) -> Record:
        """The record, checked. Raises BadRecordError."""
        raw = self.records[index]
        try:
            return parse_record(raw)
        except RecordFault as fault:
            raise self._bad(index, record_id(raw), fault) from fault

    def sample(self, index: int, builder: SampleBuilder) -> Sample:
        """The record as a training sample. Raises BadRecordError."""
        record = self.record(index)
        try:
            return builder.sample(record, self.image_root, dataset=self.name, key=self.key(index))
        except RecordFault as fault:
            raise self._bad(index, record.id, fault) from fault

    def prompt(self, index: int, builder: SampleBuilder) -> Prompt:
        """The prompt for the record's last answer. Raises BadRecordError."""
        record = self.record(index)
        try:
            return builder.record_prompt(record, self.image_root)
        except RecordFault as fault:
            raise self._bad(index, record.id, fault) from fault

    def _bad(self, index: int, id: str | None, fault: RecordFault) -> BadRecordError:
        return BadRecordError(str(self.records.path), index, id, self.key(index), fault.reason)


class MixtureDataset:
    """Sources with weights, drawn epoch by epoch.

    An epoch holds round(weight x len) draws of a source (halves go up): as many whole copies of it as fit, and for
    the rest records chosen without replacement, anew each epoch, by (seed, epoch, place of the source). Positions run
    through the sources in turn; shuffling is `StepOrder`'s.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], builder: SampleBuilder, *, seed: int
    ) -> None:
        if not sources:
            raise ValueError("data.mixture is empty; at least one source is needed")
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.mixture: each source needs a name of its own, got {names}; set `name`")
        self.sources = tuple(sources)
        self.builder = builder
        self.seed = seed
        counts = [_num_draws(source, weight) for source, weight in zip(sources, weights, strict=True)]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._chosen: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source -> epoch, its chosen records

    def __len__(self) -> int:
        """Draws of an epoch."""
        return int(self._ends[-1])

    def __getitem__(self, draw: Draw) -> Sample:
        """The sample of a draw. Raises BadRecordError if its record cannot be used, IndexError past the epoch."""
        source, index = self.locate(draw)
        return source.sample(index, self.builder)

    def locate(self, draw: Draw) -> tuple[Source, int]:
        """The source and the index in it that a draw stands for."""
        epoch, position = draw
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of an epoch of {len(self)} draws")
        place = int(np.searchsorted(self._ends, position, side="right"))
        source = self.sources[place]
        start = int(self._ends[place - 1]) if place else 0
        copy, offset = divmod(position - start, len(source))
        num_draws = int(self._ends[place]) - start
        is_whole_copy = (copy + 1) * len(source) <= num_draws
        return source, offset if is_whole_copy else int(self._choice(place, epoch, num_draws % len(source))[offset])

    def _choice(self, place: int, epoch: int, count: int) -> NDArray[np.int64]:
        cached = self._chosen.get(place)
        if cached is None or cached[0] != epoch:
            # place + 1, since a seed sequence takes a trailing 0 for nothing and the order draws from (seed, epoch)
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, place + 1))))
            cached = epoch, generator.choice(len(self.sources[place]), size=count, replace=False)
            self._chosen[place] = cached
        return cached[1]


def build_dataset(
    settings: DataSettings,
    mixture: Sequence[SourceSettings],
    template: Literal["plain", "chat"],
    processor: LlavaProcessor,
    num_image_tokens: NumImageTokens,
    seed: int,
) -> tuple[MixtureDataset, Collator]:
    """Dataset and collator of one stage.

    mixture, template: the stage's own, or those of `settings`. num_image_tokens: (processor, height, width) ->
    placeholders. Raises DataFileError, TemplateError or ValueError for what is wrong with files, templates or the
    mixture as a whole; single records are looked at when drawn.
    """
    sources = [open_source(source.path, source.image_root, source.name, settings.image_root) for source in mixture]
    builder = build_samples(settings, template, processor, num_image_tokens)
    dataset = MixtureDataset(sources, [source.weight for source in mixture], builder, seed=seed)
    return dataset, Collator.for_processor(processor, has_task_labels=bool(settings.task_types))


def build_samples(
    settings: DataSettings,
    template: Literal["plain", "chat"],
    processor: LlavaProcessor,
    num_image_tokens: NumImageTokens,
) -> SampleBuilder:
    """The maker of samples and prompts that a recipe's `data` describes.

    Raises TemplateError, or DataFileError for the table of clusters.
    """
    check_processor(processor)
    built = build_template(template, settings.chat_template, processor.tokenizer, processor.image_token)
    table = open_clusters(settings)
    return SampleBuilder(
        processor,
        built,
        num_image_tokens=num_image_tokens,
        max_length=settings.max_length,
        tasks=TaskRules(settings.task_types) if settings.task_types else None,
        clusters=None if table is None else InstructionClusters(table),
    )


def open_clusters(settings: DataSettings) -> ClusterTable | None:
    """The table that `data.clusters` names, if it names one. Raises DataFileError."""
    if settings.clusters is None:
        return None
    return ClusterTable.load(resolve_path(settings.clusters, settings.image_root))


def needed_data(settings: DataSettings, moe: MoEConfig | None) -> DataSettings:
    """The same settings, without a table of clusters where no router of the model reads it: an instruction that it
    does not hold would ask for the encoder in vain. moe: None for a dense model."""
    if moe is not None and moe.router.kind == "cluster":
        return settings
    return settings.model_copy(update={"clusters": None})


def open_source(path: str, image_root: str | None, name: str | None, base: str) -> Source:
    """Opens a file of LLaVA records.

    path: relative to `base`, absolute, or `package:<pack>/<rest>`; image_root the same, None is `base` itself. base:
    the recipe's `data.image_root`, `package:...` too. name: None takes the file's. Raises DataFileError.
    """
    file = resolve_path(path, base)
    root = resolve_path(image_root or "", base)
    if not root.is_dir():
        raise DataFileError(f"image_root: {root} is not a folder (for records of {file})")
    return Source(file.stem if name is None else name, read_records(file), root)


def resolve_path(path: str, base: str) -> Path:
    """A path of a recipe: `package:...`, absolute, or relative to `base` (itself a path or `package:...`)."""
    return packs.resolve(path) if path.startswith(packs.PREFIX) else packs.resolve(base) / path


def _num_draws(source: Source, weight: float) -> int:
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"data.mixture: {source.name}: weight is {weight}; it must be a positive number")
    count = math.floor(weight * len(source) + 0.5)
    if count == 0:
        raise ValueError(
            f"data.mixture: {source.name}: weight {weight} of {len(source)} record(s) gives no draw an epoch; the weight"
            f" must be at least {0.5 / len(source)}"
        )
    return count
