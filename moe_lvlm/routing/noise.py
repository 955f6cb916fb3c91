"""Noise on routing scores as a pure function of what it is for: which draw of a sample, which layer, which expert.

It is the same whatever batch, process or device the sample meets, so no generator's state has to be kept or shared.

R rows   E experts
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014): the step between states, and the finaliser's two multipliers and three shifts.
_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def sample_noise(draw_R: Tensor, *, layer: int, num_experts: int, std: float) -> Tensor:
    """Float32 [R, E] from N(0, std^2): row r depends on draw_R[r] and the layer, expert e's number on e as well.

    draw_R: integers, `RoutingContext.draw_N` or one number a row of whatever kind.

    Two uniform numbers of 53 bits an expert come from SplitMix64, seeded by the draw and the layer; Box-Muller makes
    them normal in float64. The integers are exact everywhere; two devices' logarithms and cosines may differ by their
    last bit, which float32 hides but for about one number in 2^28.

    Raises:
        ValueError: draws that are not integers, or not one a row.
    """
    if draw_R.dim() != 1 or draw_R.is_floating_point() or draw_R.is_complex() or draw_R.dtype == torch.bool:
        raise ValueError(f"draw ids: {draw_R.dtype} of shape {tuple(draw_R.shape)}; allowed: integers, one a row")
    key_R = _mix(_mix(draw_R.to(torch.int64) + _signed(_STEP)) + _signed((layer + 1) * _STEP))
    step_A = torch.tensor([_signed((i + 1) * _STEP) for i in range(2 * num_experts)], device=draw_R.device)
    bits_RE2 = _shift(_mix(key_R[:, None] + step_A), 11).unflatten(1, (num_experts, 2))
    # The first lies in (0, 1], the second in [0, 1): a logarithm of 0 cannot come up.
    first_RE = (bits_RE2[..., 0] + 1).double() * 2.0**-53
    second_RE = bits_RE2[..., 1].double() * 2.0**-53
    normal_RE = (-2 * first_RE.log()).sqrt() * (2 * math.pi * second_RE).cos()
    return (std * normal_RE).float()


def spread_draws(draw_R: Tensor, index_R: Tensor) -> Tensor:
    """Int64 [R]: a number for each part `index` (0 and above) of what a draw brought, such as a token of a sample."""
    return _mix(_mix(draw_R.to(torch.int64) + _signed(_STEP)) + (index_R.to(torch.int64) + 1) * _signed(_STEP))


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap around as those of unsigned numbers do."""
    state = (state ^ _shift(state, _SHIFTS[0])) * _signed(_MULTIPLIERS[0])
    state = (state ^ _shift(state, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    return state ^ _shift(state, _SHIFTS[2])


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift to the right with zeros from the left; int64's own shift repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(unsigned: int) -> int:
    """The int64 with the lowest 64 bits of a number."""
    return (unsigned + (1 << 63)) % (1 << 64) - (1 << 63)
