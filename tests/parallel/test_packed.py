"""Packed batches under DeepSpeed equal a plain loop over padded ones: losses, norms, parameters after three steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.parallel.comparison import assert_equals_plain_loop
from tests.parallel.jobs import Case
from tests.parallel.problems import Outcome, Problem

pytestmark = pytest.mark.distributed
Trained = Callable[[Case], list[Outcome]]


@pytest.mark.parametrize(
    ("zero", "size", "layout", "has_checkpointing"),
    [
        (2, 1, "text against images", False),
        (2, 2, "text against images", True),
        (3, 2, "text against images", False),
        (2, 2, "padding only", False),
    ],
)
def test_ranks_that_differ_in_what_they_hold(
    trained: Trained, zero: int, size: int, layout: str, has_checkpointing: bool
) -> None:
    """One rank has text alone, or nothing at all, while the other has images."""
    padded = Problem(train=("connector", "language_model"), layout=layout)
    case = Case(padded, world=2, zero=zero, expert_parallel_size=size, has_checkpointing=has_checkpointing)
    assert_equals_plain_loop(case, trained(replace(case, problem=replace(padded, is_packed=True))))


@pytest.mark.parametrize("family", ["mistral", "stablelm"])
def test_a_dense_model(trained: Trained, family: str) -> None:
    """Mistral: windows shorter than samples. StableLM: layers that hand no arguments on to the attention."""
    padded = Problem(train=("language_model",), family=family, is_sparse=False)
    case = Case(padded, world=2, zero=2, expert_parallel_size=1)
    assert_equals_plain_loop(case, trained(replace(case, problem=replace(padded, is_packed=True))))
