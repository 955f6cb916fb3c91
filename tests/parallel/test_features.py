"""Training from a frozen tower's features: as from images, where one rank has text only and the other images."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.comparison import assert_equals_plain_loop
from tests.parallel.features import train_from_features
from tests.parallel.jobs import Case
from tests.parallel.problems import Outcome, Problem
from tests.parallel.rank_server import RankServer

pytestmark = pytest.mark.distributed

STAGES = {
    "connector": Problem(layout="text against images", train=("connector",), is_sparse=False),
    "everything": Problem(layout="text against images", train=("connector", "language_model")),
    "padding only": Problem(layout="padding only", train=("connector", "moe")),
}
CASES = {
    "one process": ("connector", 1, 2, 1),
    "zero 2": ("connector", 2, 2, 1),
    "zero 2, experts": ("everything", 2, 2, 2),
    "zero 2, bad records": ("padding only", 2, 2, 1),
    "zero 3": ("everything", 2, 3, 1),
}


@pytest.mark.parametrize("name", list(CASES))
def test_features_equal_images(ranks: RankServer, tmp_path: Path, name: str) -> None:
    stage, world, zero, size = CASES[name]
    case = Case(STAGES[stage], world=world, zero=zero, expert_parallel_size=size)
    results = ranks.run(train_from_features, case, world=world, folder=tmp_path)
    # the plain loop is one process with images
    assert_equals_plain_loop(case, [Outcome.of(result) for result in results])
