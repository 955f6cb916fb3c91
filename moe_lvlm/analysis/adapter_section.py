"""The report's section on LoRA experts: figures 4 to 7 of MoCLE, and what is seen in them, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_lvlm.analysis import plots
from moe_lvlm.analysis.adapters import AdapterStatistics
from moe_lvlm.analysis.instructions import InstructionSample, map_instructions, run_encoder
from moe_lvlm.analysis.paths import IntArray, entropy, mutual_information, shared_information
from moe_lvlm.analysis.pictures import Picture, saved_picture
from moe_lvlm.analysis.plots.adapters import site_title, subsets
from moe_lvlm.analysis.run_folder import RunFolder

POINTS = "instructions.json"
"""Beside the page: the points of the t-SNE."""
_NUM_SHUFFLES = 200


@dataclass(frozen=True, slots=True)
class SubsetRow:
    """A dataset or task, as shown. top_expert: of the linear where one expert takes most."""

    name: str
    part: str
    samples: str
    clusters: str
    top_cluster: str
    top_expert: str
    weight: str


@dataclass(slots=True)
class AdapterSection:
    """What the page shows. missing: what could not be shown, and why."""

    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    rows: list[SubsetRow] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def is_expected(recipe: dict[str, Any]) -> bool:
    """Whether a run's recipe puts LoRA experts into the language model."""
    adapter = (recipe.get("model") or {}).get("adapter") or {}
    return adapter.get("kind") == "mocle" and any(stage.get("adapt") for stage in recipe.get("stages") or [])


def adapter_section(folder: RunFolder, report: Path) -> AdapterSection | None:
    """Draws the figures into `report`. None where nothing of LoRA experts was evaluated."""
    training, evaluation, sample = folder.training_adapters, folder.adapters, folder.instructions
    first = training or evaluation
    if first is None:
        return None
    section = AdapterSection(rows=_rows(training, evaluation))
    _add_training_data(section, sample)
    if sample is not None and sample.datasets:
        _add_map(section, folder, sample, report)
    _add_clusters(section, sample, evaluation, report, label="dataset" if first.gating == "dataset" else "cluster")
    _add_experts(section, training, evaluation, report)
    _add_weights(section, training, evaluation, report)
    return section


def _rows(training: AdapterStatistics | None, evaluation: AdapterStatistics | None) -> list[SubsetRow]:
    has_universal = any(part is not None and part.has_universal for part in (training, evaluation))
    rows = []
    for name, is_training, counts in subsets(training, evaluation):
        mean, deviation = counts.gate
        top = counts.expert_shares_LE.max(axis=1)
        frequent = counts.clusters.most_common(1)
        rows.append(
            SubsetRow(
                name=name,
                part="training data" if is_training else "evaluation",
                samples=f"{counts.samples:,}",
                clusters=f"{len(counts.clusters):,}" if frequent else "–",
                top_cluster=f"{frequent[0][0]} ({frequent[0][1] / counts.clusters.total():.0%})" if frequent else "–",
                top_expert=f"{top.mean():.0%} ({top.min():.0%} to {top.max():.0%})",
                weight=f"{1 - mean:.3f} ± {deviation:.3f}" if has_universal else "–",
            )
        )
    return rows


def _add_training_data(section: AdapterSection, sample: InstructionSample | None) -> None:
    if sample is None:
        section.missing.append(
            "There is no sample of the training data, so figures show the evaluation alone and the instructions are "
            "not mapped."
        )
        return
    for name, reason in sample.left_out.items():
        section.missing.append(f"Dataset {name} of the training data is left out: {reason}.")


def _add_map(section: AdapterSection, folder: RunFolder, sample: InstructionSample, report: Path) -> None:
    try:
        found = map_instructions(sample, run_encoder(folder.recipe))
    except ValueError as error:
        section.missing.append(f"The map of instructions (t-SNE) is not drawn: {error}.")
        return
    found.save(report / POINTS)
    section.pictures += saved_picture(
        plots.instruction_map(found),
        report,
        "instructions",
        "Instructions of the training data",
        "t-SNE of the sentence embeddings of up to 100 instructions a dataset, as training draws them: a point for "
        "each distinct one, the larger the more often it was drawn, side by side where datasets share it. Distances "
        "between far groups mean nothing. A number stands above the middle of a cluster, where there is room. The points "
        f"are in {POINTS}.",
    )
    if len(sample.datasets) > 1:
        section.text.append(
            f"Of the distinct instructions {found.same_dataset:.1%} have their nearest other instruction, by the "
            f"embedding, in their own dataset; of neighbours drawn at random it would be {found.by_chance:.1%}."
        )


def _add_clusters(
    section: AdapterSection,
    sample: InstructionSample | None,
    evaluation: AdapterStatistics | None,
    report: Path,
    *,
    label: str,
) -> None:
    figure = plots.clusters_by_dataset(sample, evaluation, label=label)
    if figure is None:
        section.missing.append("Clusters by dataset are not shown: the gates of this run do not read clusters.")
        return
    section.pictures += saved_picture(
        figure,
        report,
        "clusters",
        "Clusters by dataset",
        "Each row adds up to 100 %: how the instructions of a dataset of the training data, or below the dotted line of "
        "a task of the evaluation, are shared out among the clusters that gates read.",
    )
    if sample is not None and sample.has_clusters and len(sample.datasets) > 1:
        table = sample.clusters_by_dataset()
        found = shared_information(table)
        own = table.max(axis=0).sum() / table.sum()
        section.text.append(
            f"Cluster and dataset of {table.sum():,} training instructions have a normalised mutual information of "
            f"{normalised_information(table):.3f} (0 independent, 1 the same partition). In nats it is "
            f"{found.measured:.3f}, {found.by_chance:.3f} by chance (datasets shuffled among instructions); {own:.1%} "
            "of the instructions are of the dataset that is the most frequent in their cluster."
        )


def _add_experts(
    section: AdapterSection, training: AdapterStatistics | None, evaluation: AdapterStatistics | None, report: Path
) -> None:
    section.pictures += saved_picture(
        plots.experts_by_subset(training, evaluation),
        report,
        "adapter-experts",
        "LoRA experts by dataset",
        "Each row of a panel adds up to 100 %: how the choices of one adapted linear are shared out among its LoRA "
        "experts; training data above the dotted line, tasks of the evaluation below.",
    )
    for part, statistics in (("training data", training), ("evaluation", evaluation)):
        if statistics is not None and len(statistics.subsets) > 1:
            section.text.append(_experts_text(part, statistics))
    both = merged(training, evaluation)
    section.pictures += saved_picture(
        plots.experts_by_cluster(both),
        report,
        "adapter-clusters",
        f"LoRA expert of every {'dataset' if both.gating == 'dataset' else 'cluster'}",
        "The expert that takes most of a row's samples, at each adapted linear. Rows without a sample are left out.",
    )


def _experts_text(part: str, statistics: AdapterStatistics) -> str:
    tables = [statistics.experts_by_subset(place) for place in range(len(statistics.linears))]
    values = np.array([normalised_information(table) for table in tables])
    shuffled = [shared_information(table, num_shuffles=_NUM_SHUFFLES) for table in tables]
    above = sum(found.p_value < 0.05 for found in shuffled)
    highest, lowest = (site_title(statistics.linears[place]) for place in (values.argmax(), values.argmin()))
    by_chance = np.mean([_normalise(found.by_chance, table) for found, table in zip(shuffled, tables, strict=True)])
    unit = "tokens" if statistics.gating == "token" else "samples"
    return (
        f"Of the {part}, expert and {'dataset' if part == 'training data' else 'task'} have a normalised mutual "
        f"information of {values.mean():.3f} on average over {len(tables)} adapted linears, from {values.min():.3f} "
        f"({lowest}) to {values.max():.3f} ({highest}); by chance it is {by_chance:.3f}. At {above} of {len(tables)} "
        f"linears it is above what 95 % of {_NUM_SHUFFLES} shuffles reach ({unit} taken as independent of each other)."
    )


def _add_weights(
    section: AdapterSection, training: AdapterStatistics | None, evaluation: AdapterStatistics | None, report: Path
) -> None:
    figure = plots.universal_weight(training, evaluation)
    if figure is None:
        section.missing.append("Weights of the universal expert are not shown: these adapters have none.")
        return
    section.pictures += saved_picture(
        figure,
        report,
        "universal-weight",
        "Weight of the universal expert",
        "1 - G, mean over samples and adapted linears, without the noise of training; the line runs from the linear "
        "where it is lowest to the one where it is highest. A gate that knows nothing gives it the weight of the "
        "dashed line.",
    )
    for part, statistics in (("training data", training), ("evaluation", evaluation)):
        if statistics is None or len(statistics.subsets) < 2:
            continue
        weights = {name: 1 - counts.gate[0] for name, counts in statistics.subsets.items()}
        low, high = min(weights, key=lambda name: weights[name]), max(weights, key=lambda name: weights[name])
        section.text.append(
            f"Of the {part}, the universal expert has its lowest weight on {low} ({weights[low]:.3f}) and its highest "
            f"on {high} ({weights[high]:.3f})."
        )


def merged(training: AdapterStatistics | None, evaluation: AdapterStatistics | None) -> AdapterStatistics:
    """Both together, to count by cluster; at least one is there."""
    parts = [part for part in (training, evaluation) if part is not None]
    both = AdapterStatistics(parts[0].gating, parts[0].has_universal)
    for part in parts:
        both.merge(part)
    return both


def normalised_information(table: IntArray) -> float:
    """Mutual information of row and column, by the mean of their entropies, as scikit-learn has it; 1 where there is
    but one row and one column."""
    return _normalise(mutual_information(table), table)


def _normalise(information: float, table: IntArray) -> float:
    entropies: Sequence[float] = [entropy(table.sum(axis=axis)) for axis in (0, 1)]
    if max(entropies) <= 0:
        return 1.0
    return information / (sum(entropies) / 2)
