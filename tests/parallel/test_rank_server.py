"""The tests' own server: a rank that fails or hangs ends its group soon, and everyone's output is shown."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.parallel.jobs import fail_on_second_rank, hang, rank_and_pid
from tests.parallel.rank_server import RankServer, RanksFailedError

pytestmark = pytest.mark.distributed


def test_results_come_by_rank(ranks: RankServer, tmp_path: Path) -> None:
    results = ranks.run(rank_and_pid, world=3, folder=tmp_path)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert len({pid for _, pid in results} | {os.getpid()}) == 4


def test_a_failing_rank(ranks: RankServer, tmp_path: Path) -> None:
    """The other rank waits for it in a collective."""
    start = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"(?s)rank 0:.*rank 1:.*on purpose"):
        ranks.run(fail_on_second_rank, world=2, folder=tmp_path)
    assert time.monotonic() - start < 60


def test_a_hanging_rank(ranks: RankServer, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match=r"(?s)limit 2 s.*rank 1:.*in hang"):
        ranks.run(hang, world=2, folder=tmp_path, timeout=2)
    assert len(ranks.run(rank_and_pid, world=1, folder=tmp_path)) == 1
