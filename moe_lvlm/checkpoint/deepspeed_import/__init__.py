"""Checkpoints of DeepSpeed 0.19.8, plain and universal, as logical tensors that `rewrite.write_checkpoint` can write."""

from moe_lvlm.checkpoint.deepspeed_import.checkpoint import (
    DeepSpeedCheckpoint,
    is_deepspeed_checkpoint,
    open_deepspeed,
)

__all__ = ["DeepSpeedCheckpoint", "is_deepspeed_checkpoint", "open_deepspeed"]
