"""DeepSpeed 0.19.8's engines as a `LiveTraining`. The only file of this room that knows DeepSpeed's internals.

Where the masters are (seen in 0.19.8; each attribute below is private and may change with the version):
* ZeRO 1, 2: `DeepSpeedZeroOptimizer`. Parameters of a group, reordered and padded, flattened and cut into equal
  partitions over the group's data-parallel ranks (experts: the expert-data-parallel ones).
* ZeRO 1 with bf16 and float32 gradients: `BF16_Optimizer`, the same without reordering.
* ZeRO 3: `DeepSpeedZeroOptimizer_Stage3`. Each parameter is cut into equal partitions; a sub-group's flat master is
  this rank's partitions one after the other.
* ZeRO 0 in float32: the torch optimizer itself.

`param._hp_mapping` says the same but not always: with `round_robin_gradients` its offsets are those of the unordered
list, and with several groups its optimizer fragments stay empty for all but the first. So they are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from moe_lvlm.checkpoint.fragments import FlatGroup, LiveTraining, Piece, live_model
from moe_lvlm.config.deepspeed import DEEPSPEED_VERSION

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def check_version(version: str = deepspeed.__version__) -> None:
    """Raise ValueError unless DeepSpeed is the version whose private layout this file knows."""
    if version.split("+")[0] != DEEPSPEED_VERSION:
        raise ValueError(f"deepspeed is {version}; checkpoints know the internals of {DEEPSPEED_VERSION} only")


def live_engine(engine: DeepSpeedEngine) -> LiveTraining:
    """An engine's masters, moments and weights on this rank. Raises ValueError on what cannot be saved exactly."""
    check_version()
    wrapper = engine.optimizer
    groups: tuple[FlatGroup, ...]
    if isinstance(wrapper, torch.optim.Optimizer):
        live = live_model(engine.module, wrapper)
        base, groups, refresh = live.optimizer, live.groups, live.refresh
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        base, groups, refresh = wrapper.optimizer, _zero_groups(wrapper), lambda: _refresh_zero(wrapper)
    elif isinstance(wrapper, BF16_Optimizer):
        base, groups, refresh = wrapper.optimizer, _bf16_groups(wrapper), lambda: _refresh_zero(wrapper)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        _check_stage3(wrapper)
        base, groups, refresh = wrapper.optimizer, _stage3_groups(wrapper), lambda: _refresh_stage3(wrapper)
    else:
        raise ValueError(
            f"DeepSpeed optimizer {type(wrapper).__name__} keeps its masters where we do not look; allowed are ZeRO 1, "
            f"2 and 3 in fp32 or bf16, and ZeRO 0 in fp32"
        )
    for group in groups:
        if group.master.dtype != torch.float32:
            raise ValueError(f"masters are {group.master.dtype}, must be float32 (bf16_master_weights_and_grads?)")
    return LiveTraining(
        model=engine.module,
        optimizer=base,
        groups=groups,
        is_partitioned=not isinstance(wrapper, torch.optim.Optimizer),
        refresh=refresh,
        facts=lambda: _facts(engine),
        set_facts=lambda facts: _set_facts(engine, facts),
    )


def _facts(engine: DeepSpeedEngine) -> dict[str, Any]:
    if engine.micro_steps % engine.gradient_accumulation_steps() != 0:
        raise ValueError(
            f"micro-step {engine.micro_steps} is inside of an accumulation over {engine.gradient_accumulation_steps()}: "
            f"gradients are not stored, save after the optimizer's step"
        )
    counters = {name: int(getattr(engine, name)) for name in _COUNTERS}
    scheduler = engine.lr_scheduler
    return {**counters, "lr_scheduler": None if scheduler is None else scheduler.state_dict()}


def _set_facts(engine: DeepSpeedEngine, facts: Mapping[str, Any]) -> None:
    for name in _COUNTERS:
        if name in facts:
            setattr(engine, name, int(facts[name]))
    if engine.lr_scheduler is not None and facts.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(facts["lr_scheduler"])


def partition_pieces(
    parameters: Sequence[nn.Parameter], offsets: Sequence[int], *, partition: int, partition_size: int
) -> tuple[Piece, ...]:
    """What a partition of a flat buffer holds of parameters that lie at these offsets in it."""
    first, last = partition * partition_size, (partition + 1) * partition_size
    pieces = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        start, stop = max(offset, first), min(offset + parameter.numel(), last)
        if start < stop:
            pieces.append(Piece(parameter, start - offset, start - first, stop - start))
    return tuple(pieces)


def _zero_groups(wrapper: DeepSpeedZeroOptimizer) -> tuple[FlatGroup, ...]:
    groups = []
    for index, master in enumerate(wrapper.single_partition_of_fp32_groups):
        parameters = wrapper.round_robin_bit16_groups[index]
        pieces = partition_pieces(
            parameters,
            wrapper.round_robin_bit16_offsets[index],
            partition=torch.distributed.get_rank(wrapper.real_dp_process_group[index]),
            partition_size=int(wrapper.partition_size[index]),
        )
        groups.append(_group(master, pieces, parameters, wrapper.optimizer.param_groups[index]))
    return tuple(groups)


def _bf16_groups(wrapper: BF16_Optimizer) -> tuple[FlatGroup, ...]:
    groups = []
    for index, master in enumerate(wrapper.fp32_groups_flat_partition):
        parameters = wrapper.bf16_groups[index]
        pieces = partition_pieces(
            parameters,
            list(accumulate((parameter.numel() for parameter in parameters[:-1]), initial=0)),
            partition=torch.distributed.get_rank(wrapper.real_dp_process_group[index]),
            partition_size=master.numel(),
        )
        groups.append(_group(master, pieces, parameters, wrapper.optimizer.param_groups[index]))
    return tuple(groups)


def _stage3_groups(wrapper: DeepSpeedZeroOptimizer_Stage3) -> tuple[FlatGroup, ...]:
    groups = []
    for index, master in enumerate(wrapper.fp32_partitioned_groups_flat):
        pieces = []
        offset = 0
        for parameter in wrapper.fp16_groups[index]:
            size = parameter.partition_numel()
            start = size * torch.distributed.get_rank(parameter.ds_process_group)
            numel = min(size, math.prod(parameter.ds_shape) - start)
            if numel > 0:  # a rank past the end of a small parameter holds padding only
                pieces.append(Piece(parameter, start, offset, numel))
            offset += size
        options = wrapper.optimizer.param_groups[wrapper.sub_group_to_group_id[index]]
        groups.append(_group(master, tuple(pieces), wrapper.fp16_groups[index], options))
    return tuple(groups)


def _group(
    master: Tensor, pieces: tuple[Piece, ...], parameters: Sequence[nn.Parameter], options: dict[str, Any]
) -> FlatGroup:
    return FlatGroup(master=master, pieces=pieces, parameters=tuple(parameters), options=options)


def _check_stage3(wrapper: DeepSpeedZeroOptimizer_Stage3) -> None:
    if wrapper.swap_optimizer or wrapper.params_in_nvme_and_cpu:
        raise ValueError("zero_optimization: offload to nvme is not supported by checkpoints; allowed are none and cpu")
    if wrapper.offload_optimizer and wrapper.partial_offload != 1.0:
        raise ValueError(f"zero_optimization.offload_optimizer.ratio is {wrapper.partial_offload}, allowed is 1.0")
    if wrapper.zero_hpz_partition_size > 1:
        raise ValueError(f"zero_hpz_partition_size is {wrapper.zero_hpz_partition_size}, allowed is 1")


def _refresh_zero(wrapper: DeepSpeedZeroOptimizer | BF16_Optimizer) -> None:
    wrapper.update_lp_params()
    # DeepSpeed's safe_get_full_optimizer_state and its like look through fragments of the state they saw first
    if all(
        wrapper.optimizer.state.get(master)
        for options in wrapper.optimizer.param_groups
        for master in options["params"]
    ):
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def _refresh_stage3(wrapper: DeepSpeedZeroOptimizer_Stage3) -> None:
    # as in DeepSpeedZeroOptimizer_Stage3.step: free what is gathered, copy, gather again what is always gathered
    wrapper._partition_all_parameters()
    for sub_group in range(len(wrapper.fp16_groups)):
        wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
    if wrapper.persistent_parameters:
        wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
