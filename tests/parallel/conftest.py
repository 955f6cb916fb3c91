"""Fixtures of the parallel room: one server of ranks for all its tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.parallel.jobs import Case, train
from tests.parallel.problems import Outcome
from tests.parallel.rank_server import RankServer


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankServer]:
    """Forks groups of processes."""
    with RankServer() as server:
        yield server


@pytest.fixture(scope="session")
def trained(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], list[Outcome]]:
    """Each rank's outcome of a case; a case is run once."""

    @cache
    def run(case: Case) -> list[Outcome]:
        results = ranks.run(train, case, world=case.world, folder=tmp_path_factory.mktemp("case"))
        return [Outcome.of(result) for result in results]

    return run
