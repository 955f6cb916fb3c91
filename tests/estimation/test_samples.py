"""Micro-batches that are expected of samples' lengths."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lvlm.estimation.samples import MicroBatches, SampleLengths, expect_micro_batches


def expect(lengths: SampleLengths, **changes: Any) -> MicroBatches:
    settings: dict[str, Any] = {
        "visual_tokens": 100,
        "micro_batch": 4,
        "global_batch": 32,
        "world_size": 4,
        "batching": "padded",
        "balance": False,
        "tail_share": 0.1,
    }
    return expect_micro_batches(lengths, **(settings | changes))


def test_equal_samples() -> None:
    found = expect(SampleLengths(mean_text=40, spread=0, text_only=0))
    assert found.typical == found.largest
    assert found.typical.sample_lengths == (140,) * 4
    assert found.typical.padded_to == 140
    assert found.typical.num_images == 4
    assert found.typical.supervised == 4 * 20
    assert found.typical.tail_share == 0.1
    assert (found.imbalance, found.padding) == (1.0, 0.0)


def test_samples_are_cut() -> None:
    found = expect(SampleLengths(mean_text=5000, spread=0, text_only=0, max_length=512))
    assert found.typical.sample_lengths == (512,) * 4


def test_batching() -> None:
    """Random lengths: packed rows have no padding, and balance spreads or sorts them."""
    lengths = SampleLengths(text_only=0.1)
    padded, packed = expect(lengths), expect(lengths, batching="packed")
    assert padded.padding > 0.2 and packed.padding == 0
    assert packed.typical.padded_to is None
    assert expect(lengths, balance=True).padding < padded.padding / 2
    balanced = expect(lengths, batching="packed", balance=True)
    assert 1 <= balanced.imbalance < packed.imbalance < padded.imbalance
    assert padded.largest.positions > padded.typical.positions


@pytest.mark.parametrize("wrong", [{"mean_text": 0}, {"spread": -1}, {"text_only": 1.1}, {"images": -1}])
def test_lengths_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: .*; allowed: "):
        SampleLengths(**wrong)
