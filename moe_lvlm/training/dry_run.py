"""What a recipe would do, without doing it: the resolved recipe, DeepSpeed's dict, parameters, memory."""

from __future__ import annotations

import io
import json
import os
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_lvlm.config.load import dump_recipe
from moe_lvlm.config.recipe import Recipe, StageSettings
from moe_lvlm.training.memory import ParameterGroup, StateMemory, state_memory
from moe_lvlm.training.plan import plan_stages


def describe(recipe: Recipe, *, world_size: int | None = None) -> str:
    """Text for a terminal. The model is built on meta tensors: nothing large is read or made.

    world_size: processes to plan for; None takes the launcher's WORLD_SIZE, or the fewest that expert parallelism
        allows.

    Raises:
        ValueError: whatever `train` would refuse for the same recipe.
    """
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", recipe.parallel.expert_parallel_size))
    parts = [f"# recipe, resolved\n{dump_recipe(recipe).rstrip()}\n"]
    for plan in plan_stages(recipe, world_size=world_size):
        stage, groups = plan.settings, plan.groups
        deepspeed = json.dumps(plan.deepspeed, indent=2)
        parts.append(f"# stage {stage.name}: DeepSpeed, {world_size} process(es)\n{deepspeed}\n")
        parts.append(_parameters(stage, groups))
        parts.append(_memory(recipe, stage, groups, plan.deepspeed, world_size))
    return "\n".join(parts)


def _parameters(stage: StageSettings, groups: list[ParameterGroup]) -> str:
    table = Table(title=f"stage {stage.name}: parameters", title_justify="left", min_width=60)
    for heading, justify in (("part", "left"), ("parameters", "right"), ("trainable", "right"), ("expert", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for group in groups:
        table.add_row(group.name, f"{group.count:,}", f"{group.trainable:,}", "yes" if group.is_expert else "no")
    table.add_section()
    table.add_row("all", f"{sum(g.count for g in groups):,}", f"{sum(g.trainable for g in groups):,}", "")
    return _text(table)


def _memory(
    recipe: Recipe, stage: StageSettings, groups: list[ParameterGroup], deepspeed: dict[str, Any], world_size: int
) -> str:
    zero = deepspeed["zero_optimization"]
    memory: StateMemory = state_memory(
        groups,
        bytes_per_weight=2 if recipe.train.precision == "bf16" else 4,
        zero_stage=int(zero.get("stage", 0)),
        world_size=world_size,
        expert_parallel_size=recipe.parallel.expert_parallel_size,
        offloads_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offloads_weights=_is_offloaded(zero, "offload_param"),
    )
    table = Table(
        title=f"stage {stage.name}: memory of each of {world_size} process(es)",
        caption="without activations and communication buffers",
        title_justify="left",
        caption_justify="left",
        min_width=60,
    )
    table.add_column("kind")
    table.add_column("MiB", justify="right")
    rows = {"weights": memory.weights, "gradients": memory.gradients, "optimizer and masters": memory.optimizer}
    for kind, size in rows.items():
        table.add_row(kind, f"{size / 2**20:,.1f}")
    table.add_section()
    table.add_row("device", f"{sum(rows.values()) / 2**20:,.1f}")
    if memory.host:
        table.add_row("host (offloaded)", f"{memory.host / 2**20:,.1f}")
    return _text(table)


def _is_offloaded(zero: dict[str, Any], key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()
