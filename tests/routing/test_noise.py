"""Noise by draw, layer and expert: beside SplitMix64 in plain integers, its moments, and what it does not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from moe_lvlm.routing.noise import sample_noise

_MASK = (1 << 64) - 1


def split_mix(seed: int) -> tuple[int, int]:
    """(next state, number), as in the reference code of SplitMix64."""
    state = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return state, z ^ (z >> 31)


def plain_noise(draw: int, layer: int, num_experts: int) -> list[float]:
    _, key = split_mix(draw & _MASK)
    state = key
    for _ in range(layer + 1):
        state, key = split_mix(state)
    state, row = key, []
    for _ in range(num_experts):
        state, first = split_mix(state)
        state, second = split_mix(state)
        radius = math.sqrt(-2 * math.log(((first >> 11) + 1) / 2**53))
        row.append(radius * math.cos(2 * math.pi * ((second >> 11) / 2**53)))
    return row


def test_split_mix_is_the_published_one() -> None:
    """The first numbers of seed 1234567, as other implementations list them."""
    state, numbers = 1234567, []
    for _ in range(3):
        state, number = split_mix(state)
        numbers.append(number)
    assert numbers == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("layer", [0, 1, 11])
def test_equals_plain_integers(layer: int) -> None:
    draws = [0, 1, 2, -1, 123456789, 2**62 + 12345, 2**63 - 1, -(2**63)]
    noise_RE = sample_noise(torch.tensor(draws), layer=layer, num_experts=5, std=0.7)
    expected = torch.tensor([plain_noise(draw, layer, 5) for draw in draws], dtype=torch.float64) * 0.7
    assert noise_RE.dtype == torch.float32
    torch.testing.assert_close(noise_RE.double(), expected, rtol=1e-7, atol=1e-9)


def test_moments_and_independence() -> None:
    """200 000 numbers: bounds are five standard errors."""
    noise_RE = sample_noise(torch.arange(50_000), layer=6, num_experts=4, std=1.0).double()
    count = noise_RE.numel()
    assert abs(noise_RE.mean()) < 5 / math.sqrt(count)
    assert abs(noise_RE.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((noise_RE**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((noise_RE**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs((noise_RE.abs() < 1).double().mean() - 0.6826895) < 5 * math.sqrt(0.2166 / count)
    other_RE = sample_noise(torch.arange(50_000), layer=7, num_experts=4, std=1.0).double()
    following_RE = sample_noise(torch.arange(1, 50_001), layer=6, num_experts=4, std=1.0).double()
    columns = torch.cat([noise_RE, other_RE, following_RE], dim=1)
    correlation = torch.corrcoef(columns.t()) - torch.eye(12)
    assert correlation.abs().max() < 6 / math.sqrt(50_000)


def test_depends_on_nothing_else() -> None:
    """Not on the batch, the number of experts, the std but by its factor, the type of the ids, or torch's generator."""
    draws = torch.randint(0, 2**40, (1000,), generator=torch.Generator().manual_seed(0))
    noise_RE = sample_noise(draws, layer=8, num_experts=3, std=1.0)
    torch.manual_seed(5)
    order = torch.randperm(1000)
    assert torch.equal(sample_noise(draws[order], layer=8, num_experts=3, std=1.0), noise_RE[order])
    one_by_one = torch.cat([sample_noise(draw[None], layer=8, num_experts=3, std=1.0) for draw in draws[:50]])
    assert torch.equal(one_by_one, noise_RE[:50])
    assert torch.equal(sample_noise(draws, layer=8, num_experts=7, std=1.0)[:, :3], noise_RE)
    assert torch.equal(sample_noise(draws, layer=8, num_experts=3, std=0.5), noise_RE * 0.5)
    small = torch.arange(9, dtype=torch.int32)
    assert torch.equal(
        sample_noise(small, layer=0, num_experts=2, std=1.0),
        sample_noise(small.long(), layer=0, num_experts=2, std=1.0),
    )
    assert not sample_noise(draws, layer=8, num_experts=3, std=0.0).any()
    assert sample_noise(draws[:0], layer=8, num_experts=3, std=1.0).shape == (0, 3)


@pytest.mark.parametrize("draws", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64), torch.ones(2) > 0])
def test_wrong_ids(draws: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"draw ids: .*; allowed: integers, one a row"):
        sample_noise(draws, layer=0, num_experts=2, std=1.0)
