"""What must not change the numbers, or only within a precision: gradient checkpointing, bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.parallel.comparison import assert_equals_plain_loop
from tests.parallel.jobs import Case
from tests.parallel.plain_loop import solve
from tests.parallel.problems import Outcome, Problem

pytestmark = pytest.mark.distributed
Trained = Callable[[Case], list[Outcome]]

WHOLE = Problem(train=("connector", "language_model"), num_steps=2)
ROUTED = Problem(train=("connector", "moe"))


@pytest.mark.parametrize("zero", [2, 3])
def test_gradient_checkpointing(trained: Trained, zero: int) -> None:
    plain = Case(WHOLE, world=2, zero=zero, expert_parallel_size=2)
    checkpointed = replace(plain, has_checkpointing=True)
    assert_equals_plain_loop(checkpointed, trained(checkpointed))
    for off, on in zip(trained(plain), trained(checkpointed), strict=True):
        assert_close(on.losses, off.losses, rtol=0, atol=1e-7)
        assert_close(on.parameters, off.parameters, rtol=0, atol=1e-7)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_stays_near_fp32(trained: Trained, zero: int) -> None:
    expected = solve(ROUTED).losses
    for outcome in trained(Case(ROUTED, world=2, zero=zero, expert_parallel_size=2, precision="bf16")):
        assert_close(outcome.losses, expected, rtol=2e-2, atol=0)
        assert {parameter.dtype for parameter in outcome.parameters.values()} == {torch.bfloat16}
    # what is asked for is less than what training gains
    assert expected[0] - expected[-1] > 2 * 2e-2 * expected[0]
