"""What a checkpoint says besides tensors: counters, the schedule, and what the user stored with it."""

from __future__ import annotations

from typing import Any

from moe_lvlm.checkpoint.deepspeed_import.collected import Collected
from moe_lvlm.checkpoint.deepspeed_import.torch_files import Record
from moe_lvlm.config.deepspeed import DEEPSPEED_VERSION

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# All that DeepSpeed itself puts in a model's file; the rest is the user's client_state
_DEEPSPEED_KEYS = {
    *_COUNTERS,
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
    "num_experts",
    "ds_autoep_layers",
    "autoep_layers",
    "universal_checkpoint_info",
    "folding",
}


class NotPlainError(ValueError):
    """A value that JSON does not know."""


def read_engine_facts(model: Record, collected: Collected) -> dict[str, Any]:
    """Counters and schedule, as our own checkpoints of an engine have them."""
    counters = {name: model.get(name, int) for name in _COUNTERS}
    scheduler: Any = None
    try:
        scheduler = plain(model.data.get("lr_scheduler"))
    except NotPlainError as error:
        collected.note(f"lr_scheduler: its state was left out: {error}")
    return {**counters, "lr_scheduler": scheduler}


def read_client_state(model: Record, collected: Collected) -> dict[str, Any]:
    """What the user gave to save_checkpoint, as far as JSON can hold it."""
    state = {}
    for key, value in model.data.items():
        if key in _DEEPSPEED_KEYS:
            continue
        try:
            state[_key(key)] = plain(value)
        except NotPlainError as error:
            collected.note(f"client_state: {key!r} was left out: {error}")
    return state


def note_what_is_lost(model: Record, collected: Collected) -> None:
    """Tell of what a checkpoint of DeepSpeed may have and ours has not."""
    version = str(model.data.get("ds_version"))
    if version.split("+")[0] != DEEPSPEED_VERSION:
        collected.note(f"written by DeepSpeed {version}; the layout known here is that of {DEEPSPEED_VERSION}")
    config = model.optional("ds_config", dict) or {}
    if (config.get("zero_optimization") or {}).get("stage") in (2, 3) and model.data.get("frozen_param_shapes") is None:
        collected.note("saved with exclude_frozen_parameters: weights that are not trained are missing")
    for key in ("data_sampler", "random_ltd"):
        if model.data.get(key) is not None:
            collected.note(f"{key}: DeepSpeed's own state of it was left out")
    collected.note("random generators and the position in the data are no part of a checkpoint of DeepSpeed")


def plain(value: Any) -> Any:
    """The value as JSON would give it back. Raises NotPlainError on anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {_key(key): plain(one) for key, one in value.items()}
    raise NotPlainError(f"a {type(value).__name__} is no plain data")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise NotPlainError(f"key {key!r} is not a string")
    return key
