"""Figures of a run, one function a figure: each returns a matplotlib Figure of its own, or None without its data."""

from __future__ import annotations

from moe_lvlm.analysis.plots.adapters import (
    clusters_by_dataset,
    experts_by_cluster,
    experts_by_subset,
    instruction_map,
    universal_weight,
)
from moe_lvlm.analysis.plots.examples import tail_overlay
from moe_lvlm.analysis.plots.paths import expert_load_by_task, paths_by_task
from moe_lvlm.analysis.plots.routing import accuracy_by_task, foreground_agreement, load_by_modality, rpv_histogram
from moe_lvlm.analysis.plots.style import save
from moe_lvlm.analysis.plots.training import load_over_training, loss_by_stage

__all__ = [
    "accuracy_by_task",
    "clusters_by_dataset",
    "expert_load_by_task",
    "experts_by_cluster",
    "experts_by_subset",
    "foreground_agreement",
    "instruction_map",
    "load_by_modality",
    "load_over_training",
    "loss_by_stage",
    "paths_by_task",
    "rpv_histogram",
    "save",
    "tail_overlay",
    "universal_weight",
]
