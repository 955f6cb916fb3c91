"""Where a run stands, as it is saved and counted on."""

from __future__ import annotations

import json

import pytest

from moe_lvlm.training.state import TrainState

STATE = TrainState(
    stage=1, step=4, global_step=9, samples=32, bad=2, tokens=500, world_size=2, expert_parallel_size=2, zero_stage=3
)


def test_it_survives_json() -> None:
    saved = json.loads(json.dumps(STATE.to_json()))
    assert TrainState.from_json(saved | {"engine": {}, "format_version": 1}) == STATE


def test_a_missing_field_is_named() -> None:
    saved = STATE.to_json()
    del saved["tokens"]
    with pytest.raises(ValueError, match=r"state\.json: tokens missing"):
        TrainState.from_json(saved)


def test_steps_and_stages() -> None:
    after = STATE.after_step(samples=8, bad=1, tokens=40)
    assert (after.step, after.global_step, after.samples, after.bad, after.tokens) == (5, 10, 40, 3, 540)
    assert (after.stage, after.world_size) == (1, 2)
    following = after.next_stage()
    assert (following.stage, following.step, following.samples, following.bad) == (2, 0, 0, 0)
    assert (following.global_step, following.tokens, following.is_stage_done) == (10, 540, False)
