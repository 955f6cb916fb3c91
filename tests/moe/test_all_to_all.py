"""Dispatch across processes equals dispatch on one: real processes over gloo, all cases in one start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.testing import assert_close

from moe_lvlm.moe.dispatch import LocalDispatcher
from tests.moe.exchange_cases import (
    CASES,
    GROUPS,
    NUM_EXPERTS,
    WIDTH,
    WORLD,
    inputs_of,
    results_of,
    run_rank,
)
from tests.moe.tables import random_experts, run_layer

pytestmark = pytest.mark.distributed
Results = dict[tuple[int, str, bool], Any]


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Results of each rank."""
    folder = tmp_path_factory.mktemp("exchange")
    # a server that has imported everything once, instead of four processes that each do
    multiprocessing.set_forkserver_preload([run_rank.__module__])
    multiprocessing.start_processes(run_rank, args=(str(folder),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def local_results(case: str, rank: int, *, is_probed: bool) -> dict[str, Any]:
    """The same tokens with all experts on one process."""
    experts = random_experts(NUM_EXPERTS, width=WIDTH)
    x_TD, decision = inputs_of(case, rank, is_probed=is_probed)
    return results_of(run_layer(LocalDispatcher(), experts, x_TD, decision), x_TD, decision, experts)


@pytest.mark.parametrize("is_probed", [False, True], ids=["plain", "probed"])
@pytest.mark.parametrize("size", list(GROUPS))
@pytest.mark.parametrize("case", list(CASES))
def test_exchange_equals_one_process(exchanged: list[Results], size: int, case: str, is_probed: bool) -> None:
    for ranks in GROUPS[size]:
        local = {rank: local_results(case, rank, is_probed=is_probed) for rank in ranks}
        for rank in ranks:
            for what in ("out", "x", "weights", *(["probe"] if is_probed else [])):
                assert_close(exchanged[rank][size, case, is_probed][what], local[rank][what], atol=1e-5, rtol=1e-5)
        # a rank's experts gather the gradients of all ranks' tokens
        for name in local[ranks[0]]["experts"]:
            whole = torch.cat([exchanged[rank][size, case, is_probed]["experts"][name] for rank in ranks])
            summed = torch.stack([local[rank]["experts"][name] for rank in ranks]).sum(dim=0)
            assert_close(whole, summed, atol=1e-5, rtol=1e-5, msg=name)


def test_the_cases_hold_what_they_say(exchanged: list[Results]) -> None:
    for rank in (1, 3):
        grads = exchanged[rank][4, "rank 1 and rank 3 get no row", False]["experts"]
        assert all(grad.abs().sum() == 0 for grad in grads.values())
    assert exchanged[0][4, "rank 0 has no token", False]["out"].shape == (0, WIDTH)
    assert exchanged[2][4, "rank 2 has no kept token", False]["out"].abs().sum() == 0
    assert exchanged[0][2, "even", False]["out"].abs().sum() > 0
    # the rows of several ranks meet at an expert, and the answers are not all alike
    cosines = exchanged[0][2, "uneven tokens and choices", True]["probe"]
    assert cosines.min() < 0.9 < cosines.max()
