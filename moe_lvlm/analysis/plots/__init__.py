"""Figures of a run, one function a figure: each returns a matplotlib Figure of its own, or None without its data."""

from __future__ import annotations

from moe_lvlm.analysis.plots.examples import tail_overlay
from moe_lvlm.analysis.plots.paths import expert_load_by_task, paths_by_task
from moe_lvlm.analysis.plots.routing import accuracy_by_task, foreground_agreement, load_by_modality, rpv_histogram
from moe_lvlm.analysis.plots.style import save
from moe_lvlm.analysis.plots.training import load_over_training, loss_by_stage

__all__ = [
    "accuracy_by_task",
    "expert_load_by_task",
    "foreground_agreement",
    "load_by_modality",
    "load_over_training",
    "loss_by_stage",
    "paths_by_task",
    "rpv_histogram",
    "save",
    "tail_overlay",
]
