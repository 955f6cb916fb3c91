"""Checkpoints compared bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from moe_lvlm.checkpoint.reader import Checkpoint


def assert_same_checkpoint(path: Path, expected: Path) -> None:
    """Every tensor of every kind (weights, masters, moments), their counts of steps, the state, torch's generator."""
    assert contents(path) == contents(expected)
    left, right = Checkpoint(path), Checkpoint(expected)
    assert left.state == right.state
    assert left.config == right.config
    for rank in range(left.state["saved_world_size"]):
        ours, theirs = left.rng(rank), right.rng(rank)
        assert ours is not None and theirs is not None
        assert torch.equal(ours["torch.cpu"], theirs["torch.cpu"])


def contents(path: Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Shape, step and digest of each logical tensor's bytes, by name and kind."""
    checkpoint = Checkpoint(path)
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    for name, kinds in checkpoint.index.tensors.items():
        for kind, entry in kinds.items():
            values = checkpoint.read(name, kind, 0, entry.numel)
            digest = hashlib.sha256(safetensors.torch.save({"": values})).hexdigest()
            found[name, kind] = (entry.shape, entry.step, digest)
    assert any(kind == "exp_avg_sq" for _, kind in found)
    return found
