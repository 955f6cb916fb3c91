"""Ranks whose micro-batches differ in kind: text only on one, images on the other, in every stage of training."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parallel.comparison import assert_equals_plain_loop, assert_training_is_real
from tests.parallel.jobs import Case
from tests.parallel.problems import ONE_IMAGE, TEXT, Outcome, Problem

pytestmark = pytest.mark.distributed

LAYOUT = "text against images"
STAGES = {
    "connector": Problem(layout=LAYOUT, train=("connector",), is_sparse=False),
    "dense": Problem(layout=LAYOUT, train=("connector", "language_model"), is_sparse=False),
    "sparse": Problem(layout=LAYOUT, train=("moe",)),
    "sparse and connector": Problem(layout=LAYOUT, train=("connector", "moe")),
    "everything": Problem(layout=LAYOUT, train=("connector", "language_model")),
}


def test_the_layout_holds_what_it_says() -> None:
    first, second, _ = STAGES["connector"].steps
    assert all(batch == TEXT for batch in first[0::2])
    assert all(images for batch in first[1::2] for images, _ in batch)
    assert all(batch == TEXT for batch in second[1::2])
    assert ONE_IMAGE in second[0::2]


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", list(STAGES))
def test_text_against_images(trained: Callable[[Case], list[Outcome]], stage: str, zero: int) -> None:
    case = Case(STAGES[stage], world=2, zero=zero, expert_parallel_size=2)
    assert_equals_plain_loop(case, trained(case))


@pytest.mark.parametrize("stage", list(STAGES))
def test_the_plain_loop_trains(stage: str) -> None:
    assert_training_is_real(STAGES[stage])
