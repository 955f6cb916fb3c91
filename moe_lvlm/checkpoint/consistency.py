"""Does what a checkpoint says fit together? Its index by itself, and its state beside the index and the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moe_lvlm.checkpoint import layout
from moe_lvlm.checkpoint.layout import HAS_OPTIMIZER, MOMENTS, Entry, Index, Kind

# What training's own state holds besides: counts of steps and samples, and the topology that saved.
_COUNTS = ("stage", "step", "global_step", "samples", "bad", "tokens", "zero_stage")
_SIZES = ("world_size", "expert_parallel_size", "saved_world_size")


def index_contradictions(index: Index) -> list[str]:
    """Tensors whose kinds do not fit each other, one sentence each."""
    return [
        f"{layout.INDEX_FILE}: {name}: {problem}"
        for name, kinds in index.tensors.items()
        for problem in _kind_problems(kinds)
    ]


def state_contradictions(state: Mapping[str, Any], index: Index, *, num_generators: int) -> list[str]:
    """What in state.json is no state, or is not that of these tensors and files, one sentence each.

    num_generators: how many ranks' random number generators the folder holds.
    """
    problems = [*_value_problems(state), *_rate_problems(state, index)]
    saved = state.get("saved_world_size")
    # a checkpoint that was imported has no generators
    if state.get(HAS_OPTIMIZER, True) and _is_count(saved, least=1) and num_generators not in (0, saved):
        problems.append(f"saved_world_size is {saved}, the random generators of {num_generators} ranks are there")
    return [f"{layout.STATE_FILE}: {problem}" for problem in problems]


def _kind_problems(kinds: Mapping[Kind, Entry]) -> Iterator[str]:
    moments = [kind for kind in MOMENTS if kind in kinds]
    if ("weight" in kinds) == ("master" in kinds):
        yield f"has {', '.join(sorted(kinds)) or 'nothing'}; allowed: a weight, or a master with its moments"
        return
    if moments and "master" not in kinds:
        yield f"has {', '.join(moments)} without a master"
    if len(moments) == 1:
        yield f"has {moments[0]} alone; allowed: both moments or none"
    for kind in ("master", *moments):
        if kind in kinds and kinds[kind].dtype != torch.float32:
            yield f"{kind} is {str(kinds[kind].dtype).removeprefix('torch.')}, must be float32"
    if len({entry.shape for entry in kinds.values()}) > 1:
        yield "has shapes " + ", ".join(f"{list(entry.shape)} ({kind})" for kind, entry in kinds.items())
    steps = {kinds[kind].step for kind in moments}
    if None in steps or len(steps) > 1:
        yield f"moments have steps {sorted(map(str, steps))}; allowed: one count, the same for both"
    for step in steps - {None}:
        if step is not None and not (math.isfinite(step) and step >= 0):
            yield f"step is {step}; allowed: 0 and above"
    if any(entry.step is not None for kind, entry in kinds.items() if kind not in MOMENTS):
        yield "has a step without being a moment"


def _value_problems(state: Mapping[str, Any]) -> Iterator[str]:
    if not _is_count(state.get("global_step")):
        yield f"global_step is {state.get('global_step')!r}; allowed: a whole number, 0 and above"
    for key in _COUNTS:
        if key in state and key != "global_step" and not _is_count(state[key]):
            yield f"{key} is {state[key]!r}; allowed: a whole number, 0 and above"
    for key in _SIZES:
        if key in state and not _is_count(state[key], least=1):
            yield f"{key} is {state[key]!r}; allowed: a whole number, 1 and above"
    for key in ("is_stage_done", HAS_OPTIMIZER):
        if key in state and not isinstance(state[key], bool):
            yield f"{key} is {state[key]!r}; allowed: true, false"
    if not isinstance(state.get("engine"), dict):
        yield f"engine is {state.get('engine')!r}; allowed: an object with the engine's counters"
    if _is_count(state.get("step")) and _is_count(state.get("global_step")) and state["step"] > state["global_step"]:
        yield f"step is {state['step']}, more than the whole run's global_step ({state['global_step']})"


def _rate_problems(state: Mapping[str, Any], index: Index) -> Iterator[str]:
    rates = state.get("learning_rates")
    if not isinstance(rates, dict):
        yield f"learning_rates is {rates!r}; allowed: an object with the rate of each trained tensor"
        return
    masters = {name for name, kinds in index.tensors.items() if "master" in kinds}
    if state.get(HAS_OPTIMIZER, True) is False and masters:
        yield f"{HAS_OPTIMIZER} is false, but {len(masters)} tensors have a master"
    for name, rate in rates.items():
        is_rate = isinstance(rate, (int, float)) and not isinstance(rate, bool) and math.isfinite(rate) and rate >= 0
        if not is_rate:
            yield f"learning_rates: {name} has {rate!r}; allowed: a number, 0 and above"
    if lost := sorted(masters - set(rates)):
        yield f"learning_rates: {lost[0]} is missing" + (f", and {len(lost) - 1} more" if len(lost) > 1 else "")
    if extra := sorted(set(rates) - masters):
        yield f"learning_rates: {extra[0]} is not trained" + (f", and {len(extra) - 1} more" if len(extra) > 1 else "")


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
