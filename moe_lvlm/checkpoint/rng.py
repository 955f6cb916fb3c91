"""A process's random number generators as tensors: Python's, numpy's, torch's on the CPU and on each CUDA device."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def capture_rng() -> dict[str, Tensor]:
    """All states, for a safetensors file."""
    version, internal, gauss = random.getstate()
    mersenne = np.random.get_state(legacy=False)
    assert isinstance(mersenne, dict)
    state = {
        "python.version": torch.tensor(version),
        "python.state": torch.tensor(internal, dtype=torch.int64),
        "numpy.keys": torch.from_numpy(mersenne["state"]["key"].astype(np.int64)),
        "numpy.position": torch.tensor([mersenne["state"]["pos"], mersenne["has_gauss"]]),
        "numpy.gauss": torch.tensor(mersenne["gauss"], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if gauss is not None:
        state["python.gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available():
        state |= {f"torch.cuda.{index}": one for index, one in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Set all generators to what `capture_rng` gave. CUDA states of devices that are not here are left out."""
    gauss = state["python.gauss"].item() if "python.gauss" in state else None
    random.setstate((int(state["python.version"]), tuple(state["python.state"].tolist()), gauss))
    position, has_gauss = state["numpy.position"].tolist()
    keys = state["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy.gauss"].item()))
    torch.set_rng_state(state["torch.cpu"])
    for index in range(torch.cuda.device_count()):
        if (one := state.get(f"torch.cuda.{index}")) is not None:
            torch.cuda.set_rng_state(one, index)
