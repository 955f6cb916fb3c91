"""Datasets, and a mixture of them with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import ProcessorMixin

from moe_lvlm.config.adapter import LoRASettings, MoCLESettings
from moe_lvlm.config.moe import MoEConfig
from moe_lvlm.config.recipe import DataSettings, SourceSettings, Template
from moe_lvlm.config.records import RecordsSettings
from moe_lvlm.data import packs
from moe_lvlm.data.clusters import ClusterTable, InstructionClusters
from moe_lvlm.data.collator import Collator
from moe_lvlm.data.connector_text import ConnectorText
from moe_lvlm.data.draws import draw_number
from moe_lvlm.data.errors import BadRecordError, DataFileError, RecordFault
from moe_lvlm.data.features import FeatureCache
from moe_lvlm.data.json_files import RecordFile
from moe_lvlm.data.layout import LLAVA, LLAVA_FIRST_TURN, Layout
from moe_lvlm.data.llava_json import read_records
from moe_lvlm.data.published import open_published
from moe_lvlm.data.records import Record
from moe_lvlm.data.sample import NumImageTokens, Prompt, Sample, SampleBuilder, check_processor
from moe_lvlm.data.tasks import TaskRules
from moe_lvlm.data.templates import build_template


class Draw(NamedTuple):
    """A place in the endless stream of epochs: 0 <= position < size of an epoch."""

    epoch: int
    position: int


@dataclass(frozen=True)
class Source:
    """One dataset: a file of records, how they are read, and the folder that their images lie below."""

    name: str
    records: RecordFile
    image_root: Path
    layout: Layout = LLAVA

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        """The name of a sample: `<dataset>/<index>`."""
        return f"{self.name}/{index}"

    def record(self, index: int, draw: int | None = None) -> Record:
        """The record, checked. draw: chooses what is drawn anew each time, such as one of ten people's answers; None is
        the record as an evaluation shows it. Raises BadRecordError."""
        raw = self.records[index]
        try:
            return self.layout.record(raw, draw)
        except RecordFault as fault:
            raise self._bad(index, self.layout.record_id(raw), fault) from fault

    def facts(self, index: int) -> Mapping[str, Any]:
        """What the record says beside its conversation, for metrics (docs/evaluation.md). Raises RecordFault."""
        return self.layout.facts(self.records[index])

    def sample(self, index: int, builder: SampleBuilder, draw: int | None = None) -> Sample:
        """The record as a training sample. Raises BadRecordError."""
        record = self.record(index, draw)
        try:
            return builder.sample(record, self.image_root, dataset=self.name, key=self.key(index), draw=draw)
        except RecordFault as fault:
            raise self._bad(index, record.id, fault) from fault

    def length(self, index: int, builder: SampleBuilder, draw: int | None = None) -> int:
        """Tokens of the record's training sample, whose images are not decoded. Raises BadRecordError."""
        record = self.record(index, draw)
        try:
            return builder.length(record, self.image_root)
        except RecordFault as fault:
            raise self._bad(index, record.id, fault) from fault

    def instructions(self, index: int) -> tuple[str, ...]:
        """All instructions that draws of the record can give, without image marks. Raises BadRecordError."""
        raw = self.records[index]
        try:
            return self.layout.instructions(raw)
        except RecordFault as fault:
            raise self._bad(index, self.layout.record_id(raw), fault) from fault

    def prompt(self, index: int, builder: SampleBuilder) -> Prompt:
        """The prompt for the record's last answer. Raises BadRecordError."""
        record = self.record(index)
        try:
            return builder.record_prompt(record, self.image_root, dataset=self.name)
        except RecordFault as fault:
            raise self._bad(index, record.id, fault) from fault

    def _bad(self, index: int, id: str | None, fault: RecordFault) -> BadRecordError:
        return BadRecordError(str(self.records.path), index, id, self.key(index), fault.reason)


class MixtureDataset:
    """Sources in some proportion, drawn epoch by epoch.

    num_draws: of each source in an epoch: as many whole copies of it as fit, and for the rest records chosen without
    replacement, anew each epoch, by (seed, epoch, place of the source). Positions run through the sources in turn;
    shuffling is `StepOrder`'s.
    """

    def __init__(
        self, sources: Sequence[Source], num_draws: Sequence[int], builder: SampleBuilder, *, seed: int
    ) -> None:
        if not sources:
            raise ValueError("data.mixture is empty; at least one source is needed")
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.mixture: each source needs a name of its own, got {names}; set `name`")
        self.sources = tuple(sources)
        self.builder = builder
        self.seed = seed
        assert len(num_draws) == len(sources) and min(num_draws) > 0
        self._ends = np.cumsum(num_draws, dtype=np.int64)
        self._chosen: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source -> epoch, its chosen records

    def __len__(self) -> int:
        """Draws of an epoch."""
        return int(self._ends[-1])

    def __getitem__(self, draw: Draw) -> Sample:
        """The sample of a draw. Raises BadRecordError if its record cannot be used, IndexError past the epoch."""
        source, index = self.locate(draw)
        return source.sample(index, self.builder, draw_number(self.seed, *draw))

    def length(self, draw: Draw) -> int:
        """Tokens of a draw's sample; 0 if its record is bad, as far as that shows without its images."""
        source, index = self.locate(draw)
        try:
            return source.length(index, self.builder, draw_number(self.seed, *draw))
        except BadRecordError:  # counted when the sample is drawn
            return 0

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
    template: Template,
    processor: ProcessorMixin,
    num_image_tokens: NumImageTokens,
    seed: int,
    *,
    answers_apart: bool = False,
) -> tuple[MixtureDataset, Collator]:
    """Dataset and collator of one stage.

    mixture, template: the stage's own, or those of `settings`. num_image_tokens: (processor, height, width) ->
    placeholders. answers_apart: for an encoder-decoder language model (`SampleBuilder`). Raises DataFileError,
    TemplateError or ValueError for what is wrong with files, templates or the mixture as a whole; single records are
    looked at when drawn.
    """
    ratios = [source.ratio for source in mixture if source.ratio is not None]
    if len(ratios) not in (0, len(mixture)):
        raise ValueError(
            f"data.mixture: {len(ratios)} of {len(mixture)} sources have a ratio; allowed: all of them, or none"
        )
    features = open_features(settings)
    builder = build_samples(
        settings,
        template,
        processor,
        num_image_tokens,
        answers_apart=answers_apart,
        mixture=mixture,
        features=features,
    )
    _check_datasets(builder)
    sources = [open_records(source, settings.image_root) for source in mixture]
    weights = [source.weight for source in mixture]
    num_draws = draws_by_ratio(sources, ratios) if ratios else draws_by_weight(sources, weights)
    dataset = MixtureDataset(sources, num_draws, builder, seed=seed)
    collator = Collator.for_processor(
        processor,
        has_task_labels=bool(settings.task_types),
        is_packed=settings.batching == "packed",
        feature_shape=None if features is None else features.shape,
    )
    return dataset, collator


def _check_datasets(builder: SampleBuilder) -> None:
    """Raises ValueError for a table of clusters by dataset that is another mixture's."""
    names = None if builder.clusters is None else builder.clusters.table.datasets
    if names is not None and names != builder.datasets:
        raise ValueError(
            f"data.clusters: a table of the datasets {', '.join(names)}, but the mixture has {', '.join(builder.datasets)}; "
            "allowed: the same in the same order (tools/fit_clusters.py --by-dataset)"
        )


def build_samples(
    settings: DataSettings,
    template: Template,
    processor: ProcessorMixin,
    num_image_tokens: NumImageTokens,
    *,
    answers_apart: bool = False,
    mixture: Sequence[SourceSettings] | None = None,
    features: FeatureCache | None = None,
) -> SampleBuilder:
    """The maker of samples and prompts that a recipe's `data` describes.

    mixture: the stage's own; None takes that of `settings`. features: what training samples take in the place of images.
    A processor with a `qformer_tokenizer` (InstructBLIP's) has a
    connector that reads words, the others none. Raises TemplateError, or DataFileError for the table of clusters.
    """
    check_processor(processor)
    built = build_template(
        template,
        settings.chat_template,
        processor.tokenizer,
        str(processor.image_token),
        closes_prompt=answers_apart,
    )
    table = open_clusters(settings)
    connector_tokenizer = getattr(processor, "qformer_tokenizer", None)
    return SampleBuilder(
        processor,
        built,
        num_image_tokens=num_image_tokens,
        max_length=settings.max_length,
        tasks=TaskRules(settings.task_types) if settings.task_types else None,
        clusters=None if table is None else InstructionClusters(table),
        connector_text=None if connector_tokenizer is None else ConnectorText(connector_tokenizer),
        answers_apart=answers_apart,
        reads_instruction=settings.connector_words == "instruction",
        datasets=[source_name(source) for source in (settings.mixture if mixture is None else mixture)],
        features=features,
    )


def open_clusters(settings: DataSettings) -> ClusterTable | None:
    """The table that `data.clusters` names, if it names one. Raises DataFileError."""
    if settings.clusters is None:
        return None
    return ClusterTable.load(resolve_path(settings.clusters, settings.image_root))


def open_features(settings: DataSettings) -> FeatureCache | None:
    """The cache that `data.feature_cache` names, if it names one. Raises DataFileError."""
    if settings.feature_cache is None:
        return None
    folder = resolve_path(settings.feature_cache, settings.image_root)
    return FeatureCache(folder, base=packs.resolve(settings.image_root))


def needed_data(
    settings: DataSettings, moe: MoEConfig | None, adapter: LoRASettings | MoCLESettings | None = None
) -> DataSettings:
    """The same settings, without a table of clusters where no router or gate of the model reads it: an instruction that
    it does not hold would ask for the encoder in vain. moe, adapter: None for a model without them."""
    if moe is not None and moe.router.kind == "cluster":
        return settings
    if isinstance(adapter, MoCLESettings) and adapter.gating in ("cluster", "dataset"):
        return settings
    return settings.model_copy(update={"clusters": None})


def open_records(settings: RecordsSettings, base: str, *, for_evaluation: bool = False) -> Source:
    """Opens the dataset that a recipe describes. Raises DataFileError.

    base: the recipe's `data.image_root`, `package:...` too. for_evaluation: captions come a record an image, with all
    that were written for it, in place of a record a caption.
    """
    root = resolve_path(settings.image_root or "", base)
    if not root.is_dir():
        file = resolve_path(settings.path, base)
        raise DataFileError(f"image_root: {root} is not a folder (for records of {file})")
    records, layout = read_dataset(settings, base, for_evaluation=for_evaluation)
    return Source(source_name(settings), records, root, layout)


def read_dataset(settings: RecordsSettings, base: str, *, for_evaluation: bool = False) -> tuple[RecordFile, Layout]:
    """The records of a dataset and how they are read, as for `open_records`; its images need not be there."""
    file = resolve_path(settings.path, base)
    if settings.source == "llava_json":
        return read_records(file, settings.where), LLAVA_FIRST_TURN if settings.turns == "first" else LLAVA
    annotations, ocr_tokens = (
        None if other is None else resolve_path(other, base) for other in (settings.annotations, settings.ocr_tokens)
    )
    return open_published(settings, file, annotations, by_image=for_evaluation, ocr_tokens=ocr_tokens)


def source_name(settings: RecordsSettings) -> str:
    """The name of a dataset: the recipe's, or that of its file."""
    return Path(settings.path).stem if settings.name is None else settings.name


def resolve_path(path: str, base: str) -> Path:
    """A path of a recipe: `package:...`, absolute, or relative to `base` (itself a path or `package:...`)."""
    return packs.resolve(path) if path.startswith(packs.PREFIX) else packs.resolve(base) / path


def draws_by_weight(sources: Sequence[Source], weights: Sequence[float]) -> list[int]:
    """Draws of each source in an epoch: round(weight x len), halves going up.

    Raises:
        ValueError: a weight that is no positive number, or by which a source is never drawn.
    """
    return [_num_draws(source, weight) for source, weight in zip(sources, weights, strict=True)]


def draws_by_ratio(sources: Sequence[Source], ratios: Sequence[float]) -> list[int]:
    """Draws of each source in an epoch, in the proportion of `ratios`; the epoch is the shortest in which each record of
    every source is seen (the others' more than once)."""
    longest = max(len(source) / ratio for source, ratio in zip(sources, ratios, strict=True))
    return [math.floor(ratio * longest + 0.5) for ratio in ratios]


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
