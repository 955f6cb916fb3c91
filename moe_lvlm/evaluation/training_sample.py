"""A sample of the training data on its way through a trained model: what its LoRA experts do by dataset (MoCLE figures
4 to 7)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moe_lvlm.analysis.adapters import AdapterStatistics
from moe_lvlm.analysis.instructions import Instruction, InstructionSample
from moe_lvlm.config.recipe import Recipe, SourceSettings
from moe_lvlm.data.clustering import recipe_sources
from moe_lvlm.data.draws import draw_number
from moe_lvlm.data.errors import BadRecordError, DataFileError, RecordFault
from moe_lvlm.data.instructions import first_instruction
from moe_lvlm.data.mixture import Source, open_records, source_name
from moe_lvlm.data.records import Record
from moe_lvlm.data.sample import SampleBuilder
from moe_lvlm.evaluation.loaded import LoadedRun
from moe_lvlm.evaluation.routing import Answered, RoutingCollector

LISTED = 1000
"""Records of a dataset whose instructions are kept."""
ROUTED = 100
"""Records of a dataset that pass the model."""


def route_training_data(
    loaded: LoadedRun,
    recipe: Recipe,
    *,
    batch_size: int,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[InstructionSample, AdapterStatistics]:
    """Draw records of each dataset of the stages from the one that adapts on, list the instructions of up to 1000, and
    route the conversations of up to 100, without their last answers and without noise.

    A record that cannot be used is passed over, as in training. A dataset that cannot be read, or of which nothing can
    be used, is left out with the reason. limit: of records of a dataset, for both. advance: told of each dataset done.

    Raises:
        ValueError: the model has no LoRA experts, or an instruction is not in the table of clusters and its encoder is
            not there.
    """
    collector = RoutingCollector(loaded.model, loaded.processor, num_examples=0)
    if collector.adapters is None:
        raise ValueError(f"{recipe.name}: the model has no LoRA experts; allowed: a run of model.adapter, kind mocle")
    sample = InstructionSample(num_clusters=_num_clusters(loaded.builder))
    for place, settings in enumerate(recipe_sources(recipe)):
        name = source_name(settings)
        # by the place, too: several datasets may be of one file
        random = np.random.default_rng((recipe.seed, place))
        try:
            listed, routed = _draw(settings, recipe, loaded.builder, random, limit=limit)
        except DataFileError as error:
            sample.left_out[name] = str(error)
        else:
            sample.datasets.setdefault(name, []).extend(listed)
            collector.update(routed, batch_size=batch_size)
        advance(1)
    return sample, collector.adapters


def _num_clusters(builder: SampleBuilder) -> int | None:
    return None if builder.clusters is None else builder.clusters.table.num_clusters


def _draw(
    settings: SourceSettings, recipe: Recipe, builder: SampleBuilder, random: np.random.Generator, *, limit: int | None
) -> tuple[list[Instruction], list[Answered]]:
    """Instructions, and prompts. Raises DataFileError where there are none."""
    source = open_records(settings, recipe.data.image_root)
    num_listed, num_routed = (count if limit is None else min(count, limit) for count in (LISTED, ROUTED))
    order = random.choice(len(source), size=min(len(source), 2 * num_listed), replace=False)
    listed: list[Instruction] = []
    routed: list[Answered] = []
    reason = "it holds no record"
    for index in order.tolist():
        if len(listed) == num_listed:
            break
        try:
            # any draw will do: it chooses a template, as each epoch of the training chose one
            record = source.record(index, draw_number(recipe.seed, 0, index))
            if len(routed) < num_routed:
                routed.append(_answered(source, index, record, builder))
        except (BadRecordError, RecordFault) as error:
            reason = str(error)
            continue
        text = first_instruction(record.turns)
        listed.append(Instruction(text, _row(text, source.name, builder)))
    if not listed:
        raise DataFileError(
            f"{source.records.path}: none of {len(order)} records drawn can be used; the last: {reason}"
        )
    return listed, routed


def _answered(source: Source, index: int, record: Record, builder: SampleBuilder) -> Answered:
    """What comes before the record's last answer. Raises RecordFault."""
    return Answered(
        key=source.key(index),
        task=source.name,
        question=first_instruction(record.turns),
        answer=record.turns[-1].text,
        prediction="",
        prompt=builder.record_prompt(record, source.image_root, dataset=source.name),
        foreground=[None] * len(record.images),
    )


def _row(text: str, dataset: str, builder: SampleBuilder) -> int | None:
    """Of the adapters' table: the instruction's cluster, or the dataset's place in the mixture."""
    if builder.clusters is None:
        return None
    is_by_dataset = builder.clusters.table.datasets is not None and dataset in builder.datasets
    return builder.datasets.index(dataset) if is_by_dataset else builder.clusters.cluster(text)
