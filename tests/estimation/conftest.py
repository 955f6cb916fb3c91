"""Fixtures of the estimation room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.rank_server import RankServer


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankServer]:
    """Forks groups of processes."""
    with RankServer() as server:
        yield server
